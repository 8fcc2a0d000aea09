"""From clips to stored activations: extraction, the store, engines, alignment by time."""
