"""What a model has to beat: the popularity list and EASE, which is also the offline teacher."""
