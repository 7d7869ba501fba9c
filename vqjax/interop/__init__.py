"""The only doors to other programs and their files."""
