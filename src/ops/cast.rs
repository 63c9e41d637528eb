//! Casts between f32 and bf16, to nearest, ties to even; NaN stays NaN.

use crate::device::Call;
use crate::{DType, Device, Error, Result, TensorMut, TensorRef};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a> {
    /// Any shape, f32 or bf16. Overwritten.
    pub out: TensorMut<'a>,
    /// As `out`, the other dtype.
    pub inp: TensorRef<'a>,
}

/// `out = inp`, in `out`'s dtype.
///
/// # Errors
/// [`Error::Shape`] unless the shapes agree; [`Error::DType`] unless one is f32 and the other bf16.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let call = Call { op: "cast", dev };
    let to = match args.inp.dtype() {
        DType::F32 => DType::Bf16,
        DType::Bf16 => DType::F32,
        found => {
            return Err(Error::DType {
                op: call.op,
                arg: "inp",
                expected: "F32 or Bf16".into(),
                found,
            });
        }
    };
    args.out.expect(call, "out", to, args.inp.shape())?;
    match dev {
        Device::Cpu(_) => cpu::forward(args),
        Device::Cuda(gpu) => return Err(gpu.missing()),
    }
    Ok(())
}

mod cpu {
    use half::bf16;
    use half::slice::HalfFloatSliceExt;
    use rayon::prelude::*;

    use super::Forward;
    use crate::DType;

    /// Elements of a piece of work.
    const PIECE: usize = 65_536;

    pub(super) fn forward(args: Forward<'_>) {
        if args.inp.dtype() == DType::F32 {
            let out = args.out.into_slice::<bf16>().par_chunks_mut(PIECE);
            out.zip(args.inp.as_slice::<f32>().par_chunks(PIECE))
                .for_each(|(out, inp)| out.convert_from_f32_slice(inp));
        } else {
            let out = args.out.into_slice::<f32>().par_chunks_mut(PIECE);
            out.zip(args.inp.as_slice::<bf16>().par_chunks(PIECE))
                .for_each(|(out, inp)| inp.convert_to_f32_slice(out));
        }
    }
}
