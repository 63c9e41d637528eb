//! What every op does with arguments that do not fit: it says which one, and writes nothing.

use pixmim::dtype::Element;
use pixmim::{DType, Error, Result, TensorMut, TensorRef};

/// A tensor whose type and shape are data, so that a test can spoil them.
#[derive(Clone)]
pub(crate) struct Any {
    dtype: DType,
    shape: Vec<usize>,
    words: Vec<u64>,
}

macro_rules! with_type {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            DType::F32 => with_type!(@ f32, $T, $body),
            DType::Bf16 => with_type!(@ half::bf16, $T, $body),
            DType::F64 => with_type!(@ f64, $T, $body),
            DType::U8 => with_type!(@ u8, $T, $body),
            DType::I32 => with_type!(@ i32, $T, $body),
            DType::I64 => with_type!(@ i64, $T, $body),
            other => unreachable!("{other:?} is not tested"),
        }
    };
    (@ $type:ty, $T:ident, $body:expr) => {{
        type $T = $type;
        $body
    }};
}

impl Any {
    /// All zeros.
    pub(crate) fn new(dtype: DType, shape: &[usize]) -> Self {
        let elems: usize = shape.iter().product();
        let words = vec![0; (elems * dtype.size_bytes()).div_ceil(8)];
        Self { dtype, shape: shape.to_vec(), words }
    }

    pub(crate) fn holding<T: Element>(values: &[T], shape: &[usize]) -> Self {
        let mut any = Self::new(T::DTYPE, shape);
        bytemuck::cast_slice_mut::<u64, T>(&mut any.words)[..values.len()].copy_from_slice(values);
        any
    }

    fn elems(&self) -> usize {
        self.shape.iter().product()
    }

    pub(crate) fn view(&self) -> TensorRef<'_> {
        with_type!(self.dtype, T => {
            let elements = &bytemuck::cast_slice::<u64, T>(&self.words)[..self.elems()];
            TensorRef::new(elements, &self.shape).expect("made so")
        })
    }

    pub(crate) fn view_mut(&mut self) -> TensorMut<'_> {
        let elems = self.elems();
        with_type!(self.dtype, T => {
            let elements = &mut bytemuck::cast_slice_mut::<u64, T>(&mut self.words)[..elems];
            TensorMut::new(elements, &self.shape).expect("made so")
        })
    }
}

/// A tensor argument as it should be.
pub(crate) struct Arg {
    name: &'static str,
    good: Any,
    /// Dimensions that no other argument fixes.
    free: &'static [usize],
}

pub(crate) fn arg(name: &'static str, dtype: DType, shape: &[usize]) -> Arg {
    Arg { name, good: Any::new(dtype, shape), free: &[] }
}

/// The last argument of many ops.
pub(crate) fn workspace_arg(bytes: usize) -> Arg {
    Arg { free: &[0], ..arg("workspace", DType::U8, &[bytes]) }
}

impl Arg {
    /// Dimensions in which the op may be given another size.
    pub(crate) fn free(self, free: &'static [usize]) -> Self {
        Self { free, ..self }
    }

    pub(crate) fn holding<T: Element>(mut self, values: &[T]) -> Self {
        self.good = Any::holding(values, &self.good.shape);
        self
    }
}

/// The error of a call in which argument `name` is replaced.
#[track_caller]
pub(crate) fn refusal(
    args: &[Arg],
    call: &dyn Fn(&mut [Any]) -> Result<()>,
    name: &str,
    bad: Any,
) -> Error {
    let mut tensors: Vec<Any> = args.iter().map(|arg| arg.good.clone()).collect();
    let at = args.iter().position(|arg| arg.name == name).expect("an argument of the op");
    tensors[at] = bad;
    let before: Vec<_> = tensors.iter().map(|tensor| tensor.words.clone()).collect();
    let Err(err) = call(&mut tensors) else {
        let Any { dtype, shape, .. } = &tensors[at];
        panic!("`{name}` of {dtype:?} {shape:?} was not refused");
    };
    let unchanged = tensors.iter().zip(before).all(|(now, before)| now.words == before);
    assert!(unchanged, "wrote before it refused `{name}`");
    err
}

/// Numbers that are none in f32.
pub(crate) const NO_NUMBERS: [f64; 4] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e39];

/// Calls the op with each of these numbers for its argument `name`: it says so, and writes nothing.
#[track_caller]
pub(crate) fn refuses_numbers(
    name: &str,
    numbers: &[f64],
    args: &[Arg],
    call: &dyn Fn(&mut [Any], f64) -> Result<()>,
) {
    for &number in numbers.iter().chain(&NO_NUMBERS) {
        let unspoilt = &args[0];
        let call = |tensors: &mut [Any]| call(tensors, number);
        match refusal(args, &call, unspoilt.name, unspoilt.good.clone()) {
            Error::Invalid { name: found, .. } => assert_eq!(found, name),
            err => panic!("{name} {number}: {err}"),
        }
    }
}

/// Calls the op with each argument spoilt in turn: another dtype, another rank, each dimension longer or empty, a
/// workspace one byte short. The call as it should be succeeds.
#[track_caller]
pub(crate) fn refuses_what_does_not_fit(
    op: &'static str,
    args: &[Arg],
    call: &dyn Fn(&mut [Any]) -> Result<()>,
) {
    let mut tensors: Vec<Any> = args.iter().map(|arg| arg.good.clone()).collect();
    call(&mut tensors).expect("the call as it should be");
    let names: Vec<_> = args.iter().map(|arg| arg.name).collect();
    let module = op.split("::").next().expect("never empty");
    let refusal = |name, bad| refusal(args, call, name, bad);
    for Arg { name, good, free } in args {
        let Any { dtype, shape, .. } = good;
        let other = match dtype {
            DType::I32 => DType::I64,
            DType::U8 => DType::F32,
            _ => DType::I32,
        };
        match refusal(name, Any::new(other, shape)) {
            Error::DType { op: o, arg, found, .. } => {
                assert_eq!((o, arg, found), (op, *name, other));
            }
            err => panic!("{op}: `{name}` of {other:?}: {err}"),
        }
        if *dtype == DType::F32 {
            // Not judged by name: the op cannot know which of its tensors is the odd one out.
            let err = refusal(name, Any::new(DType::F64, shape));
            assert!(matches!(err, Error::DType { op: o, .. } if o == op), "{err}");
        }
        if *name == "workspace" {
            let needed = good.elems();
            let err = refusal(name, Any::new(*dtype, &[needed - 1]));
            match err {
                Error::Workspace { op: o, needed: n, found } => {
                    assert_eq!((o, n, found), (op, needed, needed - 1));
                }
                err => panic!("{err}"),
            }
            continue;
        }
        let other_rank = match shape.len() {
            1 => vec![1, shape[0], 1],
            _ => vec![good.elems()],
        };
        let spoilt = (0..shape.len()).filter(|d| !free.contains(d)).flat_map(|d| {
            let resized = |size| [&shape[..d], &[size], &shape[d + 1..]].concat();
            [resized(shape[d] + 1), resized(0)]
        });
        for bad in spoilt.chain([other_rank]) {
            match refusal(name, Any::new(*dtype, &bad)) {
                Error::Shape { op: o, arg, .. } => {
                    assert!(o == op && names.contains(&arg), "{o} {arg}");
                }
                Error::Invalid { name, .. } => assert!(name.starts_with(module), "{name}"),
                err => panic!("{op}: `{name}` of shape {bad:?}: {err}"),
            }
        }
    }
}
