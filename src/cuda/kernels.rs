//! The kernels built into this library.

/// File stem and fatbin of each; empty when built without nvcc.
pub(crate) const FATBINS: &[(&str, &[u8])] = &[];
