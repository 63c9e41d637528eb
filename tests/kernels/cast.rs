//! Casts on a GPU: every bit as on the CPU.

use half::bf16;
use pixmim::dtype::Element;
use pixmim::ops::cast::{Forward, forward};
use pixmim::{DType, Device, Error};

use crate::common::{Input, Output, gpu, normal, same_on_any_schedule};

fn cast<From: Element, To: Element>(dev: &Device, inp: &[From]) -> Vec<To> {
    let shape = [inp.len()];
    let inp = Input::new(dev, inp, &shape);
    let mut out = Output::new(dev, To::DTYPE, &shape);
    forward(dev, Forward { out: out.view(), inp: inp.view() }).unwrap();
    out.values()
}

#[test]
fn every_bf16_becomes_the_same_f32_and_comes_back() {
    let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let wide: Vec<f32> = cast(&gpu(), &all);
    let back: Vec<bf16> = cast(&gpu(), &wide);
    for ((x, wide), back) in all.iter().zip(wide).zip(back) {
        if x.is_nan() {
            assert!(wide.is_nan() && back.is_nan(), "{:#06x}", x.to_bits());
        } else {
            assert_eq!((wide.to_bits(), back.to_bits()), (x.to_f32().to_bits(), x.to_bits()));
        }
    }
}

#[test]
fn rounding_is_to_nearest_and_ties_go_to_even() {
    // Beside every 97th bf16: one below the tie, the tie, one above it; the last of them overflow to infinity.
    let inp: Vec<f32> = (0..0x7f80u32)
        .step_by(97)
        .chain([0x7f7e, 0x7f7f])
        .flat_map(|bits| [0x7fff, 0x8000, 0x8001].map(|low| f32::from_bits(bits << 16 | low)))
        .flat_map(|x| [x, -x])
        .collect();
    let want: Vec<u16> = inp.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
    let got: Vec<u16> = cast::<f32, bf16>(&gpu(), &inp).iter().map(|x| x.to_bits()).collect();
    assert_eq!(got, want);
    let tie = f32::from_bits(0x3f80_8000);
    assert_eq!(cast::<f32, bf16>(&gpu(), &[tie]), [bf16::ONE]);
}

#[test]
fn any_number_of_elements_is_done_and_no_other_touched() {
    for count in [0, 1, 3, 7, 8, 9, 2047, 2049, 4095, 4097, 8203] {
        let inp: Vec<f32> = normal(1, count, 0.0, 1.0);
        let want: Vec<bf16> = inp.iter().map(|&x| bf16::from_f32(x)).collect();
        assert_eq!(cast::<f32, bf16>(&gpu(), &inp), want);
        let wide: Vec<f32> = want.iter().map(|x| x.to_f32()).collect();
        assert_eq!(cast::<bf16, f32>(&gpu(), &want), wide);
    }
}

#[test]
fn schedules_change_no_bit() {
    let inp: Vec<f32> = normal(1, 4999, 0.0, 1.0);
    same_on_any_schedule(|dev| cast::<f32, bf16>(dev, &inp));
}

#[test]
fn memory_of_the_host_is_refused() {
    let dev = gpu();
    let host = [0f32; 8];
    let inp = pixmim::TensorRef::new(&host, &[8]).unwrap();
    let mut out = Output::new(&dev, DType::Bf16, &[8]);
    let err = forward(&dev, Forward { out: out.view(), inp }).unwrap_err();
    assert!(matches!(err, Error::Place { .. }), "{err}");
}
