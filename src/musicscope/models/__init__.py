"""Text-to-music models behind one interface, with a package per family."""
