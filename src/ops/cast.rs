//! Casts between f32 and bf16, to nearest, ties to even; NaN stays NaN.

use super::cost;
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
    args.inp.expect(call, "inp", args.inp.dtype(), args.inp.shape())?;
    args.out.expect(call, "out", to, args.inp.shape())?;
    let _span =
        dev.span("cast::forward", || cost::cast_forward([args.inp.dtype(), to], args.inp.elems()));
    match dev {
        Device::Cpu(_) => cpu::forward(args),
        Device::Cuda(gpu) => launch::forward(gpu, args)?,
    }
    Ok(())
}

mod launch {
    use std::mem::offset_of;

    use super::Forward;
    use crate::cuda::{DevPtr, Gpu};
    use crate::{DType, Result};

    /// As `Cast` in `kernels/cast.cu`.
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct Params {
        out: DevPtr,
        inp: DevPtr,
        count: i64,
    }
    const _: () = assert!(size_of::<Params>() == 24 && offset_of!(Params, count) == 16);

    const THREADS: u32 = 256;
    /// Elements of a thread.
    const ELEMS: usize = 16;

    pub(super) fn forward(gpu: &Gpu, args: Forward<'_>) -> Result<()> {
        let count = args.inp.elems();
        if count == 0 {
            return Ok(());
        }
        let kernel = match args.inp.dtype() {
            DType::F32 => "cast_to_bf16",
            _ => "cast_to_f32",
        };
        let (out, inp) = (args.out.dev_ptr(), args.inp.dev_ptr());
        let params = Params { out, inp, count: count as i64 };
        gpu.launch(kernel, count.div_ceil(THREADS as usize * ELEMS), THREADS, 0, &params)
    }
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
