//! Matrix products.
/// Whether bf16 products are native here.
pub fn bf16_is_native() -> bool { false }
