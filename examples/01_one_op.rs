//! One op: PixMIM's low-pass target keeps broad stripes and drops fine ones.

use std::f64::consts::TAU;

use pixmim::ops::low_freq_target::{self, Filter};
use pixmim::{DType, Device, Result, TensorMut, TensorRef};

const SIDE: usize = 32;

/// Grey stripes, `waves` of them across the image.
fn stripes(waves: f64, x: usize) -> f64 {
    0.2 * (TAU * waves * x as f64 / SIDE as f64).cos()
}

#[expect(clippy::print_stdout, reason = "an example shows what it does")]
fn main() -> Result<()> {
    // One image of three channels, each with 3 broad and 11 fine stripes.
    let image = |i: usize| 0.5 + stripes(3.0, i % SIDE) + stripes(11.0, i % SIDE);
    let pixels: Vec<f64> = (0..3 * SIDE * SIDE).map(image).collect();

    // The disc of radius 6 holds frequencies up to 6: the tables are made once, the op allocates nothing.
    let filter = Filter::new(&Device::cpu(), SIDE, 6.0)?;
    let bytes = low_freq_target::workspace_bytes(&Device::cpu(), DType::F64, 1, &filter, true);
    let (mut target, mut workspace) = (vec![0.0f64; 3 * SIDE * SIDE], vec![0u8; bytes]);
    low_freq_target::forward(
        &Device::cpu(),
        low_freq_target::Forward {
            target: TensorMut::new(&mut target, &[1, 1, 3 * SIDE * SIDE])?,
            pixels: TensorRef::new(&pixels, &[1, 3, SIDE, SIDE])?,
            ids_masked: TensorRef::new(&[0i32], &[1, 1])?,
            filter: &filter,
            mean: [0.0; 3],
            std: [1.0; 3],
            patch_size: SIDE, // the image is one patch: numbers come out as (row, column, channel)
            exact: true,
            workspace: TensorMut::new(&mut workspace, &[bytes])?,
        },
    )?;

    println!("{} of {} frequencies kept", filter.kept_bins(), SIDE * SIDE);
    println!("column   pixel  target  broad stripes alone");
    let mut error = 0.0f64;
    for x in 0..SIDE {
        let (got, broad) = (target[3 * x], 0.5 + stripes(3.0, x));
        error = error.max((got - broad).abs());
        if x < 8 {
            println!("{x:6}  {:6.3}  {got:6.3}  {broad:6.3}", pixels[x]);
        }
    }
    println!("largest difference: {error:.1e}");
    Ok(())
}
