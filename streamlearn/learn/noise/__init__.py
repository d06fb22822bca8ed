"""Input noise: from prepared samples to noisy views of them."""
