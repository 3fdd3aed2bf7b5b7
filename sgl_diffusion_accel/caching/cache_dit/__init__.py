"""DBCache, with the names and the defaults of cache-dit and SGLang."""
