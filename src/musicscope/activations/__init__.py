"""From clips to stored activations: extraction, the store, alignment by time."""
