"""Fine-tunes OmniGen on published shards: tokens, frozen VAE, flow loss, packed model, loop, sampling, export."""
