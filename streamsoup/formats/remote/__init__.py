"""Ingredients that lie elsewhere: models of the Hugging Face Hub, and files at addresses."""
