//! Pretrains a masked autoencoder.
fn main() {}
