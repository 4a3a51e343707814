"""`rankgrpo data import`: data sets as they are published -> the project's folder. One file a format."""
