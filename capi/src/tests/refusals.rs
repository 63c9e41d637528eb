//! Whatever is wrong with one argument is a status and a sentence that names it, and nothing is written.
//!
//! What can be wrong with an argument follows from its type in the header; everything else of the call is as it should be.

use std::any::Any;
use std::collections::BTreeSet;
use std::ptr;

use pixmim_core::DType;

use super::call::Raw;
use super::cases::{Case, cases, last_error};
use super::header::{self, Param};
use super::lab::{Arg, Lab, Memory};
use crate::status::{PIXMIM_INTERNAL, PIXMIM_OK};
use crate::tensor::{PIXMIM_MAX_DIMS, pixmim_tensor};

/// What is right although it looks wrong: function, argument, how it was spoilt (the start of it is enough), why it is right.
/// A function ending in `*` is any that starts so.
const RIGHT: &[[&str; 4]] = &[
    ["pixmim_*", "stream", "", "the CPU and the executor have none, on a GPU the caller promises"],
    ["pixmim_*", "workspace", "null", "it asks for the size"],
    ["pixmim_*", "workspace", "misaligned", "on the CPU it may start anywhere"],
    ["pixmim_*", "workspace_bytes", "0", "on the CPU some ops need none"],
    ["pixmim_*", "seed", "", "any number is a seed"],
    ["pixmim_*", "norm_pix", "0", "a flag"],
    ["pixmim_*", "exact", "0", "a flag"],
    ["pixmim_*", "scale", "-1", "a loss may be subtracted"],
    ["pixmim_*", "scale", "0", "nothing is added, the gradient is 0"],
    ["pixmim_*", "weight_decay", "0", "none"],
    ["pixmim_*", "eps", "0", "as in PyTorch"],
    ["pixmim_*", "clip", "0", "never"],
    ["pixmim_*", "beta1", "0", "no memory, as in PyTorch"],
    ["pixmim_*", "beta2", "0", "no memory, as in PyTorch"],
    ["pixmim_*", "mean", "another", "any colour"],
    ["pixmim_linear_forward", "pre", "null", "no GELU"],
    ["pixmim_linear_forward", "residual", "null", "none is added"],
    ["pixmim_linear_backward", "grad_inp", "null", "it is not wanted"],
    ["pixmim_linear_backward", "pre", "null", "there was no GELU"],
    ["pixmim_adamw_update", "copy", "null", "none is wanted"],
    ["pixmim_low_freq_target_forward", "pixels", "dtype 0", "a GPU takes bytes and f32"],
    ["pixmim_input_forward", "patches", "dtype 0", "on a GPU nothing else says f32 or bf16"],
    ["pixmim_input_forward", "patches", "dtype 1", "on a GPU nothing else says f32 or bf16"],
    ["pixmim_add_positions_backward", "grad_fill", "dtype 0", "as above"],
    ["pixmim_add_positions_backward", "grad_fill", "dtype 1", "as above"],
    ["pixmim_context_create", "options", "null", "zeros"],
    ["pixmim_context_create", "options", "0 for", "one thread for each core, or a flag"],
    ["pixmim_context_create", "options", "1 for", "one thread, or a flag"],
    ["pixmim_probe", "capacity", "0", "only the number is asked for"],
    ["pixmim_probe", "capacity", "2147483647", "there are fewer devices"],
    ["pixmim_filter_create", "radius", "1e300", "keeps all frequencies"],
    ["pixmim_tensor_init", "data", "", "it is only noted; a call that uses the tensor judges it"],
    ["pixmim_tensor_init", "device", "2147483647", "only noted; a context is for another"],
    ["pixmim_tensor_init", "dtype", "0", "f32"],
    ["pixmim_tensor_init", "ndim", "0", "a single number"],
    ["pixmim_model_*", "", "the other kind of device", "on a GPU it may be in the host's memory"],
    ["pixmim_model_*", "config", "1 for", "a flag, or a share"],
    ["pixmim_model_*", "config", "0 for", "none of it, or a flag"],
    ["pixmim_model_*", "config", "9223372036854775807 for seed", "below 2^63"],
    ["pixmim_model_*", "config", "-1 for radius", "MAE"],
    ["pixmim_model_*", "index", "0", "the first"],
    ["pixmim_model_*", "kind", "0", "weights"],
    ["pixmim_model_*", "which", "0", "predictions"],
    ["pixmim_model_step", "lr", "0", "the moments change"],
    ["pixmim_model_updates_set", "updates", "", "a count"],
    ["pixmim_model_outcome", "", "null", "it is not wanted"],
    ["pixmim_model_state_info", "", "null", "it is not wanted"],
];

struct Mutation {
    how: String,
    raw: Raw,
    /// Whether the sentence must name this very argument, not one that no longer fits to it.
    names_it: bool,
    /// A field of the argument that it must name instead.
    field: Option<String>,
    /// The memory behind `raw`.
    _kept: Box<dyn Any>,
}

impl Mutation {
    fn new(how: impl ToString, raw: Raw) -> Self {
        Self { how: how.to_string(), raw, names_it: true, field: None, _kept: Box::new(()) }
    }

    /// Of a tensor's description.
    fn tensor(how: impl ToString, memory: &Memory, spoil: impl FnOnce(&mut pixmim_tensor)) -> Self {
        let mut tensor = Box::new(*memory.tensor);
        spoil(&mut tensor);
        let raw = Raw::address(&raw const *tensor);
        Self { _kept: tensor, ..Self::new(how, raw) }
    }

    fn words(how: impl ToString, words: Vec<u64>) -> Self {
        let raw = Raw::address(words.as_ptr());
        Self { _kept: Box::new(words), ..Self::new(how, raw) }
    }
}

/// A pointer one byte off.
fn off(raw: Raw) -> Raw {
    let Raw::Word(word) = raw else { panic!("{raw:?} is no pointer") };
    Raw::Word(word + 1)
}

/// What may be wrong with an argument of this type.
fn mutations(lab: &Lab, case: &Case, param: &Param) -> Vec<Mutation> {
    let arg = case.arg(&param.name);
    let mut mutations = Vec::new();
    if let Arg::NoTensor = arg {
        return mutations;
    }
    if param.kind.contains('*') {
        mutations.push(Mutation::new("null", Raw::Word(0)));
        // A byte lies anywhere.
        if arg.raw() != Raw::Word(0) && param.kind != "const char *" {
            mutations.push(Mutation::new("misaligned", off(arg.raw())));
        }
    }
    match (param.kind.as_str(), arg) {
        (_, Arg::Tensor(memory)) => {
            mutations.extend(descriptions(lab, memory));
            mutations.extend(overlaps(case, memory));
        }
        (_, Arg::Workspace(Some(own))) => {
            let others = case.args.iter().filter_map(|(name, arg)| Some((name, arg.memory()?)));
            let others = others.filter(|(_, other)| !ptr::eq(*other, own));
            mutations.extend(others.map(|(name, other)| {
                Mutation::new(format!("overlaps {name}"), Raw::address(other.tensor.data))
            }));
        }
        ("size_t *", _) => {
            mutations.push(Mutation::words("0", vec![0]));
            mutations.push(Mutation::words("all addresses", vec![u64::MAX]));
        }
        ("double", _) => {
            let values = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 1e300, -1e300];
            mutations.extend(values.map(|x| Mutation::new(shown(x), Raw::Number(x))));
        }
        ("const double *", Arg::Block(words)) => {
            for (at, value) in [f64::NAN, f64::INFINITY, 1e300, -1.0, 0.0].into_iter().enumerate() {
                let mut words = words.to_vec();
                words[at % 3] = value.to_bits();
                let is_colour = value.abs() <= 1.0 && param.name == "mean";
                let how = if is_colour { "another".into() } else { shown(value) };
                mutations.push(Mutation::words(how, words));
            }
        }
        ("int64_t", _) => {
            let values = [-1, 0, i64::MIN, i64::MAX, 1 << 33];
            mutations.extend(values.map(|x| Mutation::new(x, Raw::Word(x as u64))));
        }
        ("int32_t", _) => {
            let values = [-7, 0, i32::MIN, i32::MAX];
            // There may be a first GPU.
            let values = values.into_iter().filter(|&x| x != 0 || param.name != "device");
            mutations.extend(values.map(|x| Mutation::new(x, Raw::Word(i64::from(x) as u64))));
        }
        ("uint64_t", _) => mutations.push(Mutation::new("huge", Raw::Word(u64::MAX))),
        ("const pixmim_context_options *" | "const pixmim_model_config *", Arg::Block(words)) => {
            // Loading reads it as creating does, and then finds that the file does not fit.
            let most = if case.function == "pixmim_model_load" { 5 } else { usize::MAX };
            mutations.extend(structs(param, words).take(most));
        }
        ("pixmim_model_config *", Arg::Block(words)) => {
            mutations.extend(structs(param, words).take(5));
        }
        ("const char *", _) => {
            let no_utf8 = u64::from_le_bytes(*b"/tmp\xFF\xFE\0\0");
            mutations.push(Mutation::words("bytes that are no UTF-8", vec![no_utf8]));
        }
        ("pixmim_device_info *", Arg::Block(words)) => {
            let mut words = words.to_vec();
            words[0] -= 8;
            mutations.push(Mutation::words("struct_size", words));
        }
        ("const int64_t *", _) => {
            for extent in [-1, i64::MIN, i64::MAX, 1 << 39] {
                mutations.push(Mutation::words(extent, vec![4, extent as u64]));
            }
        }
        ("const void *", Arg::Block(words)) => mutations.extend(dl_tensors(words)),
        _ => {}
    }
    mutations
}

fn shown(x: f64) -> String {
    if x.abs() > 1e9 { format!("{x:e}") } else { x.to_string() }
}

/// A tensor that is described in another way than it is.
fn descriptions(lab: &Lab, memory: &Memory) -> Vec<Mutation> {
    let tensor = |how: &dyn ToString, spoil: &dyn Fn(&mut pixmim_tensor)| {
        Mutation::tensor(how.to_string(), memory, spoil)
    };
    let rank = memory.dims.len();
    let mut mutations = vec![
        tensor(&"struct_size 0", &|t| t.struct_size = 0),
        tensor(&"struct_size larger", &|t| t.struct_size += 8),
        tensor(&"dtype -1", &|t| t.dtype = -1),
        tensor(&"dtype 6", &|t| t.dtype = 6),
        tensor(&"ndim -1", &|t| t.ndim = -1),
        tensor(&"ndim 7", &|t| t.ndim = PIXMIM_MAX_DIMS as i32 + 1),
        tensor(&"ndim least", &|t| t.ndim = i32::MIN),
        tensor(&"another device", &|t| t.device = 1 - lab.device.signum()),
        tensor(&"the other kind of device", &|t| t.device = -1 - lab.device),
        tensor(&"device least", &|t| t.device = i32::MIN),
        tensor(&"data null", &|t| t.data = ptr::null_mut()),
    ];
    for axis in 0..rank {
        for extent in [-1, i64::MIN, i64::MAX, 1 << 41] {
            let how = format!("extent {axis} {extent}");
            mutations.push(tensor(&how, &|t| t.shape[axis] = extent));
        }
        if memory.dims[axis] > 1 {
            for stride in [0, -1, memory.tensor.strides[axis] + 1, i64::MAX] {
                let how = format!("stride {axis} {stride}");
                mutations.push(tensor(&how, &|t| t.strides[axis] = stride));
            }
        }
    }
    let align = if lab.is_cpu() { memory.dtype.size_bytes() } else { 16 };
    for bytes in [1, align / 2].into_iter().filter(|&bytes| 0 < bytes && bytes < align) {
        let how = format!("data {bytes} bytes off");
        mutations.push(tensor(&how, &|t| t.data = t.data.wrapping_byte_add(bytes)));
    }
    // From here on the description makes sense by itself, and another argument may be the odd one out.
    for dtype in (0..6).filter(|&dtype| dtype != memory.dtype as i32) {
        // Memory for the widest, as some may be taken.
        let roomy = Memory::new(lab, DType::F64, &memory.dims);
        let mut tensor = Box::new(*roomy.tensor);
        tensor.dtype = dtype;
        let raw = Raw::address(&raw const *tensor);
        let kept = Box::new((tensor, roomy));
        let how = format!("dtype {dtype}");
        mutations.push(Mutation { how, raw, names_it: false, field: None, _kept: kept });
    }
    if memory.is_written {
        // As many elements as may be: none of the others has them.
        let rest: usize = memory.dims.iter().skip(1).product();
        let most = ((1usize << 40) / rest.max(1)) as i64;
        let spoilt = tensor(&"as many elements as may be", &|t| t.shape[0] = most);
        mutations.push(Mutation { names_it: false, ..spoilt });
    }
    mutations
}

/// A tensor that starts where another of the call does, and is written or the other is.
fn overlaps(case: &Case, memory: &Memory) -> Vec<Mutation> {
    let others = case.args.iter().filter_map(|(name, arg)| Some((name, arg.memory()?)));
    let others = others.filter(|(_, other)| !ptr::eq(*other, memory));
    let others = others.filter(|(_, other)| memory.is_written || other.is_written);
    let others = others
        .filter(|(_, other)| other.tensor.data.addr().is_multiple_of(memory.dtype.size_bytes()));
    others
        .map(|(name, other)| {
            let at = other.tensor.data;
            Mutation::tensor(format!("overlaps {name}"), memory, |t| t.data = at)
        })
        .collect()
}

/// A struct with one field spoilt, which the sentence must name.
fn structs(param: &Param, words: &[u64]) -> impl Iterator<Item = Mutation> {
    let name = param.kind.trim_start_matches("const ").trim_end_matches(" *");
    let (mut at, mut mutations) = (0, Vec::new());
    for (kind, field, count) in header::fields(name) {
        let (bytes, values): (_, Vec<(String, u64)>) = match kind.as_str() {
            "double" => {
                let values = [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e300];
                (8, values.map(|x| (shown(x), x.to_bits())).to_vec())
            }
            "int32_t" | "uint32_t" => {
                let values = [-1, i32::MAX, i32::MIN, 0, 1];
                (4, values.map(|x| (x.to_string(), u64::from(x.cast_unsigned()))).to_vec())
            }
            "int64_t" | "uint64_t" => {
                let values = [-1, i64::MAX, i64::MIN, 0, 1];
                (8, values.map(|x| (x.to_string(), x.cast_unsigned())).to_vec())
            }
            other => panic!("{name} has a field of {other}"),
        };
        for (value, bits) in values {
            let mut words = words.to_vec();
            let (word, shift) = (&mut words[at / 8], 8 * (at % 8));
            *word = if bytes == 8 {
                bits
            } else {
                *word & !(u64::from(u32::MAX) << shift) | bits << shift
            };
            let how = format!("{value} for {field}");
            mutations.push(Mutation { field: Some(field.clone()), ..Mutation::words(how, words) });
        }
        at += bytes * count;
    }
    assert_eq!(at, 8 * words.len(), "{name}");
    mutations.into_iter()
}

/// A `DLTensor` with one field spoilt.
fn dl_tensors(words: &[u64]) -> Vec<Mutation> {
    static NEGATIVE: [i64; 2] = [2, -3];
    let negative = NEGATIVE.as_ptr().expose_provenance() as u64;
    let spoilt = [
        ("device 9", 1, 9),
        ("GPU -1", 1, 2 | 0xFFFF_FFFF << 32),
        ("ndim 7", 2, words[2] & !0xFF | 7),
        ("ndim -1", 2, words[2] | 0xFFFF_FFFF),
        ("a complex dtype", 2, words[2] & !(0xFF << 32) | 5 << 32),
        ("7 bits", 2, words[2] & !(0xFF << 40) | 7 << 40),
        ("2 lanes", 2, words[2] & !(0xFFFF << 48) | 2 << 48),
        ("shape null", 3, 0),
        ("shape misaligned", 3, words[3] + 1),
        ("shape negative", 3, negative),
        ("strides misaligned", 4, words[4] + 1),
        ("strides of another layout", 4, words[3]),
        ("offset of all addresses", 5, u64::MAX),
    ];
    spoilt
        .into_iter()
        .map(|(how, at, word)| {
            let mut words = words.to_vec();
            words[at] = word;
            Mutation::words(how, words)
        })
        .collect()
}

/// The row of `RIGHT` that this is.
fn right(function: &str, arg: &str, how: &str) -> Option<usize> {
    RIGHT.iter().position(|[f, a, h, _]| {
        let of = f.strip_suffix('*').map_or(*f == function, |start| function.starts_with(start));
        of && (a.is_empty() || *a == arg) && how.starts_with(h)
    })
}

fn names(sentence: &str, word: &str) -> bool {
    sentence.split(|c: char| !c.is_alphanumeric() && c != '_').any(|found| found == word)
}

#[test]
fn one_wrong_argument_is_a_status_and_a_sentence_that_names_it() {
    let functions = header::functions();
    let (mut tried, mut seen, mut failures) = (0, BTreeSet::new(), Vec::new());
    for lab in &Lab::all() {
        for mut case in cases(lab) {
            case.size_workspace(lab, &case.raws());
            let of = functions.iter().find(|of| of.name == case.function).unwrap();
            for (at, param) in of.params.iter().enumerate() {
                for number in 0.. {
                    let Some(mutation) = mutations(lab, &case, param).into_iter().nth(number)
                    else {
                        break;
                    };
                    let Mutation { how, raw, names_it, field, .. } = &mutation;
                    let what = format!(
                        "{} on {} in {:?}: {} {how}",
                        of.name, lab.device, lab.real, param.name
                    );
                    let content = |case: &Case| -> Vec<_> {
                        case.args.iter().map(|(_, arg)| arg.content(&lab.dev)).collect()
                    };
                    let before = content(&case);
                    let mut args = case.raws();
                    args[at] = *raw;
                    let status = case.call(&args);
                    let sentence = last_error();
                    tried += 1;
                    for memory in case.args.iter().filter_map(|(_, arg)| arg.memory()) {
                        memory.expect_guards(&what);
                    }
                    let right = right(&of.name, &param.name, how);
                    if status == PIXMIM_OK {
                        match right {
                            Some(row) => drop(seen.insert(row)),
                            None => failures.push(format!("{what}: is taken")),
                        }
                        // It may have made something, or asked for a size.
                        case = again(lab, &case);
                        continue;
                    }
                    if status == PIXMIM_INTERNAL {
                        failures.push(format!("{what}: {sentence}"));
                    }
                    let named = match (names_it, field) {
                        (false, _) => of.params.iter().any(|param| names(&sentence, &param.name)),
                        (true, Some(field)) => names(&sentence, field),
                        // Too small a workspace is named as such.
                        (true, None) => [&param.name, param.name.trim_end_matches("_bytes")]
                            .iter()
                            .any(|name| names(&sentence, name)),
                    };
                    if !named {
                        failures.push(format!("{what}: does not name it: {sentence}"));
                    }
                    if content(&case) != before {
                        failures.push(format!("{what}: wrote although it refused: {sentence}"));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} of {tried}:\n{}", failures.len(), failures.join("\n"));
    let stale: Vec<_> =
        (0..RIGHT.len()).filter(|row| !seen.contains(row)).map(|row| RIGHT[row]).collect();
    assert!(stale.is_empty(), "never seen: {stale:?}");
    assert!(tried > 10_000, "only {tried} calls");
}

/// The same case with memory as it was.
fn again(lab: &Lab, case: &Case) -> Case {
    let twins = cases(lab).into_iter().filter(|twin| twin.function == case.function);
    let is_given = |case: &Case| -> Vec<_> {
        case.args.iter().map(|(_, arg)| matches!(arg, Arg::NoTensor)).collect()
    };
    let mut twin = twins.into_iter().find(|twin| is_given(twin) == is_given(case)).unwrap();
    twin.size_workspace(lab, &twin.raws());
    twin
}
