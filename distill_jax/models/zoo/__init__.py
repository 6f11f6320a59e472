"""The networks that come with the library, one file a family."""
