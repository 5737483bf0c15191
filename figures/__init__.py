"""Pictures: grids, pages and plots. Functions named draw_… return pixels, uint8 (H, W, 3)."""
