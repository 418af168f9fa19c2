"""The model families, one file each in forward order, and the layers that they share."""
