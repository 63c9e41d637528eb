//! Somebody else's stream and memory: GELU between cudarc's own copies, on its stream and over its slices. Without a GPU it
//! says why; either way it shows what a trainer without cudarc does: views of memory by its address.

use std::error::Error;

use pixmim::cuda::probe;
use pixmim::cudarc::driver::CudaContext;
use pixmim::ops::gelu;
use pixmim::{DType, Device, Gpu, Place, Result, TensorMut, TensorRef};

const SHAPE: [usize; 2] = [5, 7];

/// As a binding to another framework would be called: its tensors, and of each the address alone.
#[expect(unsafe_code, reason = "trusts addresses, as such a binding does")]
fn on_cpu(out: &mut [f32; 35], inp: &[f32; 35]) -> Result<()> {
    let (place, out, inp) = (Place::Host, out.as_mut_ptr().cast(), inp.as_ptr().cast());
    // SAFETY: both arrays have 5 x 7 numbers and are borrowed until this returns, when the work is done.
    let (out, inp) = unsafe {
        let out = TensorMut::from_raw(place, out, DType::F32, &SHAPE)?;
        (out, TensorRef::from_raw(place, inp, DType::F32, &SHAPE)?)
    };
    gelu::forward(&Device::cpu(), gelu::Forward { out, inp })
}

fn on_gpu(inp: &[f32; 35]) -> Result<Vec<f32>, Box<dyn Error>> {
    let stream = CudaContext::new(0)?.new_stream()?;
    let inp = stream.clone_htod(inp)?;
    let mut out = stream.alloc_zeros::<f32>(35)?;

    let gpu = Gpu::nvidia(0)?.borrow(&stream)?;
    let inp = gpu.view(inp.as_view(), &SHAPE)?;
    let mut view = gpu.view_mut(out.as_view_mut(), &SHAPE)?;
    let args = gelu::Forward { out: view.tensor_mut(), inp: inp.tensor() };
    gelu::forward(&Device::Cuda(gpu.clone()), args)?;
    drop(view); // what cudarc enqueues from here on comes after

    Ok(stream.clone_dtoh(&out)?)
}

#[expect(clippy::print_stdout, reason = "an example shows what it does")]
fn main() -> Result<(), Box<dyn Error>> {
    let inp = std::array::from_fn(|i| 0.2 * i as f32 - 3.4);
    let mut out = [0.0; 35];
    on_cpu(&mut out, &inp)?;
    println!(
        "by address: gelu({:.1}) = {:.4}, gelu({:.1}) = {:.4}",
        inp[12], out[12], inp[22], out[22]
    );
    if let Err(why) = probe::probe() {
        println!("on cudarc's stream: left out, as {why}");
        return Ok(());
    }
    let found = on_gpu(&inp)?;
    assert!(found.iter().zip(&out).all(|(x, y)| (x - y).abs() <= 1e-5), "CPU and GPU agree");
    println!("on cudarc's stream: the same {} numbers to 1e-5", found.len());
    Ok(())
}
