"""The embedded set: pieces, orchestrations, matched pairs, captions, rendered with soundfonts."""
