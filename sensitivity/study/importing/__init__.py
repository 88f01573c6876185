"""Tables that were measured elsewhere, imported as studies."""
