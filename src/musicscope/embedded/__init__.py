"""Side wing: the embedded models and data set, from scores and sounds to trained weights."""
