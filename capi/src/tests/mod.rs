//! Every exported function of the header, called as C calls it: on the CPU in f32 and f64, and on the host executor in f32 and
//! bf16.
//!
//! `cases` has a valid call of each function. `equality` compares what it writes with what the op of the crate writes,
//! `refusals` spoils one argument at a time, as the type says that the header gives it.

mod call;
mod cases;
mod equality;
mod header;
mod lab;
mod refusals;
