//! A backward pass, called by hand: a layer with GELU, its gradient against finite differences.

use pixmim::ops::{gelu, linear};
use pixmim::{Device, Result, TensorMut, TensorRef};

const R: usize = 5; // rows
const K: usize = 7; // inputs
const N: usize = 3; // outputs

/// The sum of `gelu(inp weight^T) grad`, and what GELU was given.
fn loss(inp: &[f64], weight: &[f64], grad: &[f64]) -> Result<(f64, Vec<f64>)> {
    let (mut out, mut pre) = (vec![0.0; R * N], vec![0.0; R * N]);
    let args = linear::Forward {
        out: TensorMut::new(&mut out, &[R, N])?,
        inp: TensorRef::new(inp, &[R, K])?,
        weight: TensorRef::new(weight, &[N, K])?,
        bias: TensorRef::new(&[0.0; N], &[N])?,
        epilogue: linear::Epilogue::Gelu(TensorMut::new(&mut pre, &[R, N])?),
    };
    linear::forward(&Device::cpu(), args)?;
    Ok((out.iter().zip(grad).map(|(y, g)| y * g).sum(), pre))
}

#[expect(clippy::print_stdout, reason = "an example shows what it does")]
fn main() -> Result<()> {
    let wave = |start: f64, len| Vec::from_iter((0..len).map(|i| (start + 2.0 * i as f64).sin()));
    let (inp, weight, grad_out) = (wave(1.0, R * K), wave(2.0, N * K), wave(3.0, R * N));

    // Backward runs through the same ops, the last one first.
    let (_, pre) = loss(&inp, &weight, &grad_out)?;
    let mut grad_pre = vec![0.0; R * N];
    let args = gelu::Backward {
        grad_inp: TensorMut::new(&mut grad_pre, &[R, N])?,
        grad_out: TensorRef::new(&grad_out, &[R, N])?,
        inp: TensorRef::new(&pre, &[R, N])?,
    };
    gelu::backward(&Device::cpu(), args)?;
    let (mut grad_weight, mut grad_bias) = (vec![0.0; N * K], vec![0.0; N]);
    let args = linear::Backward {
        grad_inp: linear::GradInput::None,
        grad_weight: TensorMut::new(&mut grad_weight, &[N, K])?,
        grad_bias: TensorMut::new(&mut grad_bias, &[N])?,
        grad_out: TensorRef::new(&grad_pre, &[R, N])?,
        inp: TensorRef::new(&inp, &[R, K])?,
        weight: TensorRef::new(&weight, &[N, K])?,
        workspace: TensorMut::new::<u8>(&mut [], &[0])?, // a GPU would need some: linear::workspace_bytes
    };
    linear::backward(&Device::cpu(), args)?;
    for (i, by_hand) in grad_weight.iter().enumerate().step_by(4) {
        let loss_at = |shift: f64| -> Result<f64> {
            let mut weight = weight.clone();
            weight[i] += shift;
            Ok(loss(&inp, &weight, &grad_out)?.0)
        };
        let difference = (loss_at(1e-5)? - loss_at(-1e-5)?) / 2e-5;
        println!("weight {i:2}: gradient {by_hand:+.8}, finite difference {difference:+.8}");
    }
    Ok(())
}
