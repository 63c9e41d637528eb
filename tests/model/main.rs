//! The network against golden values, its own finite differences, and its invariances.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod golden;
mod gradcheck;
mod parameters;

use golden::{GRADIENTS, Order, Tiny};

fn assert_close(what: &str, got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance, "{what}: {got}, expected {want}");
}

/// LSMAE's order for a 4 x 4 grid in blocks of 2 x 2, permuted [2, 0, 3, 1].
const BLOCK_ORDER: [i32; 16] = [8, 12, 9, 13, 0, 4, 1, 5, 10, 14, 11, 15, 2, 6, 3, 7];

#[test]
fn losses_are_the_golden_ones() {
    for (norm_pix, radius, want) in [
        (false, None, 2.420_112_978_034),
        (false, Some(2.0), 1.106_015_768_093),
        (true, None, 1.861_839_455_008),
        (true, Some(2.0), 1.713_184_878_851),
    ] {
        let loss = Tiny::new(&Order::Noise, radius).step(norm_pix);
        assert_close(&format!("norm_pix {norm_pix} radius {radius:?}"), loss, want, 1e-9);
    }
    for (radius, want) in [(None, 1.886_719_867_728), (Some(2.0), 1.844_081_714_499)] {
        let loss = Tiny::new(&Order::Given(BLOCK_ORDER), radius).step(true);
        assert_close(&format!("blocks, radius {radius:?}"), loss, want, 1e-9);
    }
}

#[test]
fn ids_latent_prediction_and_target_are_the_golden_ones() {
    let mut tiny = Tiny::new(&Order::Noise, Some(2.0));
    tiny.step(true);
    let acts = &tiny.acts;
    assert_eq!(acts.ids_keep.view().as_slice::<i32>(), [5, 2, 9, 8, 2, 0, 1, 4]);
    let restore = [9, 15, 1, 8, 13, 0, 5, 10, 3, 2, 7, 14, 6, 4, 11, 12];
    assert_eq!(&acts.ids_restore.view().as_slice::<i32>()[..16], restore);
    let latent = acts.latent.view().as_slice::<f64>();
    for (i, want) in [0.72127081, 1.11872324, 0.55317083, -1.19171463].into_iter().enumerate() {
        assert_close("latent", latent[i], want, 5e-9);
    }
    for (i, want) in [-1.18946077, -1.1316767, -0.42247193, -0.26557879].into_iter().enumerate() {
        assert_close("latent", latent[(5 + 4) * 16 + 12 + i], want, 5e-9);
    }
    // Patch 0 of image 0 and patch 15 of image 1 are masked; where they stand, ids_restore tells.
    let place = |b: usize, patch: usize| {
        b * 12 + acts.ids_restore.view().as_slice::<i32>()[b * 16 + patch] as usize - 4
    };
    let pred = acts.pred.view().as_slice::<f64>();
    for (i, want) in [-0.44870093, 1.46704654, -1.00046367, -0.86822383].into_iter().enumerate() {
        assert_close("pred", pred[place(0, 0) * 12 + i], want, 5e-9);
    }
    for (i, want) in [0.90175517, 1.1847749, 0.83582384, 2.06203465].into_iter().enumerate() {
        assert_close("pred", pred[place(1, 15) * 12 + 8 + i], want, 5e-9);
    }
    let patch = &tiny.target[place(0, 0) * 12..][..12];
    let mean = patch.iter().sum::<f64>() / 12.0;
    let var = patch.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 11.0;
    let want = [0.28909816, -1.18314772, 0.65627833, -0.7093828, -1.35110497, 1.3693739];
    for (x, want) in patch.iter().zip(want) {
        assert_close("target", (x - mean) / (var + 1e-6).sqrt(), want, 5e-9);
    }
}

#[test]
fn every_gradient_is_the_golden_one() {
    let mut tiny = Tiny::new(&Order::Noise, Some(2.0));
    tiny.step(true);
    assert_eq!(GRADIENTS.len(), tiny.mae.table().specs().len());
    for (name, norm, first) in GRADIENTS {
        let grad = tiny.grads.view(tiny.index(name));
        let grad = grad.as_slice::<f64>();
        let got = grad.iter().map(|g| g * g).sum::<f64>().sqrt();
        // The table has ten decimals.
        assert_close(name, got, norm, 1e-7 * norm + 5e-11);
        for (got, want) in grad.iter().zip(first) {
            assert_close(name, *got, want, 1e-7 * want.abs() + 5e-11);
        }
    }
    assert_close("total norm", tiny.grad_norm(), 3.544_680_775_385, 1e-10);
}

#[test]
fn five_steps_of_adamw_are_the_golden_ones() {
    let mut tiny = Tiny::new(&Order::Noise, Some(2.0));
    let zeros = vec![0.0; tiny.grads.flat().elems()];
    let mut moments = [zeros.clone(), zeros];
    let losses = [1.7131848789, 1.2154731791, 1.1253087315, 1.0812166931, 1.0346351310];
    for (step, want) in (1..).zip(losses) {
        let loss = tiny.step(true);
        assert_close(&format!("loss before update {step}"), loss, want, 1e-9);
        tiny.update(&mut moments, step);
    }
    for (name, want) in [
        ("cls_token", [0.0251657636, 0.1499690524]),
        ("norm.weight", [0.9080587879, 1.2080819623]),
        ("blocks.0.attn.qkv.weight", [0.2320622749, -0.2354631236]),
    ] {
        let weight = tiny.mae.weights.view(tiny.index(name));
        for (got, want) in weight.as_slice::<f64>().iter().zip(want) {
            assert_close(name, *got, want, 1e-9);
        }
    }
}
