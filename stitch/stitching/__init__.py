"""Stitching: from a graph of primitives to clusters, groups and the schemes that join them."""
