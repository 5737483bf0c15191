"""Pictures: arrays -> pixels of grids, pages with captions and curves -> PNG and GIF files."""
