"""The decoder's operators besides attention: matrix products and the small ones between them, by device."""
