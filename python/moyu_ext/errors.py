"""Errors: each derives from MoyuError and from the builtin that fits."""


class MoyuError(Exception):
    """Base of every error that moyu_ext raises on purpose."""


class ConfigurationError(MoyuError, ValueError):
    """A value that no method, calibration or command can work with."""


class UnsupportedModelError(MoyuError, TypeError):
    """A model, or a part of one, that moyu_ext does not know how to patch."""


class PatchStateError(MoyuError, RuntimeError):
    """Patching a patched model, unpatching an unpatched one, or using one in the wrong mode."""


class ArtifactError(MoyuError, ValueError):
    """A saved artefact that is missing, truncated, corrupt, or made for another model."""


class ExtensionError(MoyuError, ImportError):
    """The compiled extension is missing or does not load."""
