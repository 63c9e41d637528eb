//! A valid call of each exported function, and the op of the crate that it stands for.

use std::ptr;

use pixmim_core::{DType, Device, Result, TensorMut, TensorRef};

use super::call::{Exported, Raw};
use super::lab::{Arg, Lab, Memory, RADIUS, SIDE};
use crate::context::*;
use crate::mae::*;
use crate::status::{PIXMIM_OK, pixmim_status};
use crate::tensor::*;
use crate::vit::*;

/// A call of an exported function.
pub(super) struct Case {
    pub(super) function: &'static str,
    exported: Box<dyn Exported>,
    /// In the order of the header.
    pub(super) args: Vec<(&'static str, Arg)>,
    /// The op, called directly with the case's memory.
    pub(super) op: Option<fn(Views<'_>) -> Result<()>>,
}

impl Case {
    pub(super) fn call(&self, args: &[Raw]) -> pixmim_status {
        self.exported.call(args)
    }

    pub(super) fn raws(&self) -> Vec<Raw> {
        self.args.iter().map(|(_, arg)| arg.raw()).collect()
    }

    pub(super) fn arg(&self, name: &str) -> &Arg {
        let found = self.args.iter().find(|(n, _)| *n == name);
        &found.unwrap_or_else(|| panic!("{} has no `{name}`", self.function)).1
    }

    fn memory(&self, name: &str) -> &Memory {
        self.arg(name).memory().unwrap_or_else(|| panic!("`{name}` is no memory"))
    }

    fn words(&self, name: &str) -> &[u64] {
        let Arg::Block(words) = self.arg(name) else { panic!("`{name}` is no block") };
        words
    }

    /// Asks how large a workspace must be, with `args` for the others, and gives one.
    pub(super) fn size_workspace(&mut self, lab: &Lab, args: &[Raw]) {
        let Some(at) = self.args.iter().position(|(name, _)| *name == "workspace") else { return };
        let mut args = args.to_vec();
        args[at] = Raw::Word(0);
        assert_eq!(self.call(&args), PIXMIM_OK, "{}: {}", self.function, last_error());
        let bytes = self.words("workspace_bytes")[0] as usize;
        assert!(bytes > 0, "{}: an allocator gives NULL for nothing", self.function);
        let mut memory = Memory::new(lab, DType::U8, &[bytes]);
        memory.is_written = true;
        self.args[at].1 = Arg::Workspace(Some(memory));
    }
}

/// The sentence of this thread's last failure.
pub(super) fn last_error() -> String {
    // SAFETY: a string that ends, valid until the next failure of this thread.
    let text = unsafe { std::ffi::CStr::from_ptr(crate::status::pixmim_last_error()) };
    text.to_str().unwrap().to_owned()
}

/// What a call of an op is written with.
pub(super) struct Views<'a> {
    pub(super) dev: &'a Device,
    pub(super) case: &'a Case,
    pub(super) lab: &'a Lab,
}

impl<'a> Views<'a> {
    fn out(&self, name: &str) -> TensorMut<'a> {
        self.case.memory(name).write(self.dev)
    }
    fn inp(&self, name: &str) -> TensorRef<'a> {
        self.case.memory(name).read(self.dev)
    }
    fn f64(&self, name: &str) -> f64 {
        let Raw::Number(number) = self.case.arg(name).raw() else {
            panic!("`{name}` is no number")
        };
        number
    }
    fn size(&self, name: &str) -> usize {
        let Raw::Word(word) = self.case.arg(name).raw() else { panic!("`{name}` is no integer") };
        word as usize
    }
    fn three(&self, name: &str) -> [f64; 3] {
        let words = self.case.words(name);
        [words[0], words[1], words[2]].map(f64::from_bits)
    }
}

/// `case!(lab, function { name: argument, .. })`, with the op that it is compared with.
macro_rules! case {
    (@_ $name:ident) => { _ };
    (@ $op:expr) => { Some($op) };
    (@) => { None };
    ($function:ident { $($name:ident: $arg:expr),* $(,)? } $(, $op:expr)?) => {{
        let function: unsafe extern "C" fn($(case!(@_ $name)),*) -> pixmim_status = $function;
        Case {
            function: stringify!($function),
            exported: Box::new(function),
            args: vec![$((stringify!($name), $arg)),*],
            op: case!(@ $($op)?),
        }
    }};
}

mod images;
pub(super) mod model;
mod optimizer;
mod others;
mod transformer;

fn int(value: i64) -> Arg {
    Arg::Word(Raw::Word(value as u64))
}

fn number(value: f64) -> Arg {
    Arg::Word(Raw::Number(value))
}

/// Zeros for a struct or an address that the call fills in.
fn place(bytes: usize) -> Arg {
    Arg::Block(vec![0; bytes.div_ceil(8)].into())
}

fn numbers(values: [f64; 3]) -> Arg {
    Arg::Block(values.map(f64::to_bits).into())
}

/// Images, patches, kept ones and masked ones of an image, pixels of a patch's side, numbers of a patch, width.
const B: usize = 3;
const L: usize = 9;
const K: usize = 4;
const M: usize = 5;
const P: usize = 4;
const E: usize = 48;
const D: usize = 24;
/// Heads, outputs of a layer.
const NH: usize = 3;
const N: usize = 40;

/// The patches of three images, kept before masked.
const ORDERS: [[i64; L]; B] =
    [[7, 0, 3, 8, 1, 2, 4, 5, 6], [4, 1, 8, 0, 3, 6, 7, 2, 5], [2, 5, 6, 1, 0, 8, 3, 7, 4]];

fn ids(lab: &Lab, range: std::ops::Range<usize>) -> Arg {
    let values: Vec<_> = ORDERS.iter().flat_map(|order| order[range.clone()].to_vec()).collect();
    lab.holding(DType::I32, &[B, range.len()], &values)
}

fn ids_restore(lab: &Lab) -> Arg {
    let place = |order: &[i64; L], id| order.iter().position(|&x| x == id).unwrap() as i64;
    let values: Vec<_> =
        ORDERS.iter().flat_map(|order| (0..L as i64).map(|id| place(order, id))).collect();
    lab.holding(DType::I32, &[B, L], &values)
}

/// Three images of 12 to 14 pixels a side, the second mirrored.
const IMAGE_BYTES: usize = 3 * (12 * 12 + 14 * 13 + 12 * 12);
const GEOMETRY: [i64; 6 * B] = [0, 12, 12, 0, 0, 0, 432, 14, 13, 1, 1, 1, 978, 12, 12, -2, 0, 0];

/// All of each of them.
const WHOLE: [i64; 6 * B] = [0, 12, 12, 0, 0, 0, 432, 14, 13, 0, 0, 1, 978, 12, 12, 0, 0, 0];

/// A call of each function of the header that takes what this device has.
pub(super) fn cases(lab: &Lab) -> Vec<Case> {
    let parts = [
        others::others(lab),
        images::images(lab),
        transformer::transformer(lab),
        optimizer::optimizer(lab),
        model::models(lab),
    ];
    parts.into_iter().flatten().collect()
}

fn context(lab: &Lab) -> Arg {
    Arg::Word(Raw::address(&raw const *lab.context))
}

fn stream() -> Arg {
    Arg::Word(Raw::address(ptr::null::<u8>()))
}
