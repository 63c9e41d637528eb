//! The networks: sizes, parameters, activations, and the explicit forward and backward of the masked autoencoder.

pub mod activations;
mod block;
pub mod config;
pub mod cost;
mod decoder;
pub mod mae;
pub mod params;
pub mod pos_embed;

pub use activations::{Activations, Scratch};
pub use config::MaeConfig;
pub use mae::Mae;
