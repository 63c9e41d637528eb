//! The C ABI of pixmim. `include/pixmim.h` is its documentation, generated from here.
//!
//! An exported function reads its arguments (`call`: every pointer, struct and tensor is judged), calls the op of the crate
//! `pixmim` that bears its name, and turns what comes back into a status and a sentence (`status`).

#![expect(
    unsafe_code,
    reason = "a C ABI trusts pointers; the header says what it asks of the caller"
)]
#![expect(non_camel_case_types, reason = "types bear their names in C")]
#![expect(clippy::missing_safety_doc, reason = "the head of the header says it for all functions")]
#![expect(
    clippy::doc_markdown,
    reason = "the comments of exported functions are those of the header"
)]

mod call;
pub mod context;
pub mod mae;
pub mod model;
pub mod status;
pub mod tensor;
#[cfg(test)]
mod tests;
pub mod vit;
