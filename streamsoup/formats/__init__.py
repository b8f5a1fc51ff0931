"""Bytes to tensors: how each kind of checkpoint is opened, by its headers alone."""
