"""The decode step: a stack of decoder layers in one call, a cache with room, generate's loop."""
