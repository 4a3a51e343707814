"""From sampled lists to rewards, advantages and units, and how far the sampler is from the trainer."""
