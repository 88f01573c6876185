"""The atlas: what studies of other models say about a new one, before anything of it is measured."""
