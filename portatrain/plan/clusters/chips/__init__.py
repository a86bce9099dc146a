"""List the rows of the accelerator catalog, one file a vendor or group of vendors; nothing but data."""
