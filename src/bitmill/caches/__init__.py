"""How keys and values are stored between tokens; one file a method."""
