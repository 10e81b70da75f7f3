"""Objects: the use that a forward makes of objects among its arguments, such as caches."""
