"""Routers for RODA and RIDA: their artefacts, their training, and splitting MLPs into experts."""
