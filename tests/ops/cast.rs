//! Every bf16 there is, ties, NaN and infinities.

use half::bf16;
use pixmim::dtype::Element;
use pixmim::ops::cast::{Forward, forward};
use pixmim::{DType, Error, Result};

use crate::common::{Guarded, cpu, normal, same_on_any_threads, view};
use crate::refusal::{Any, arg, refusal};

fn cast<T: Element, U: Element>(inp: &[T]) -> Vec<U> {
    let mut out = Guarded::poisoned(&[inp.len()]);
    forward(&cpu(), Forward { out: out.view(), inp: view(inp, &[inp.len()]) }).unwrap();
    out.values()
}

#[test]
fn every_bf16_comes_back_from_f32_as_it_was() {
    let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let wide: Vec<f32> = cast(&all);
    let back: Vec<bf16> = cast(&wide);
    for ((&x, wide), back) in all.iter().zip(wide).zip(back) {
        if x.is_nan() {
            assert!(wide.is_nan() && back.is_nan(), "{:#06x}", x.to_bits());
        } else {
            // A bf16 is the upper half of the f32 of the same value.
            assert_eq!(wide.to_bits(), u32::from(x.to_bits()) << 16);
            assert_eq!(back.to_bits(), x.to_bits());
        }
    }
}

#[test]
fn f32_goes_to_the_nearest_bf16_and_ties_to_even() {
    let cases: [(u32, u16); 14] = [
        (0x3f80_0000, 0x3f80), // 1
        (0x3f80_7fff, 0x3f80), // just below half way
        (0x3f80_8000, 0x3f80), // half way, to even: down
        (0x3f80_8001, 0x3f81), // just above half way
        (0x3f81_8000, 0x3f82), // half way, to even: up
        (0xbf81_8000, 0xbf82), // the sign changes nothing
        (0x3fff_ffff, 0x4000), // a carry into the exponent
        (0x7f7f_7fff, 0x7f7f), // the largest that stays finite
        (0x7f7f_8000, 0x7f80), // overflow to infinity
        (0x7f80_0000, 0x7f80), // infinity
        (0xff80_0000, 0xff80), // minus infinity
        (0x8000_0000, 0x8000), // minus zero
        (0x0000_8001, 0x0001), // a denormal that rounds up
        (0x0000_8000, 0x0000), // a denormal half way, to even
    ];
    let inp: Vec<f32> = cases.iter().map(|case| f32::from_bits(case.0)).collect();
    for (got, (from, want)) in cast::<f32, bf16>(&inp).iter().zip(cases) {
        assert_eq!(got.to_bits(), want, "{from:#010x}");
    }
    // NaN whose payload lies in the lost half must not turn into infinity.
    for bits in [0x7fc0_0000, 0x7f80_0001, 0xff80_0001, 0xffff_ffff] {
        assert!(cast::<f32, bf16>(&[f32::from_bits(bits)])[0].is_nan(), "{bits:#010x}");
    }
}

#[test]
fn threads_change_no_bit() {
    let inp = normal::<f32>(1, &[200_001], 0.0, 1.0);
    let out = same_on_any_threads(|| cast::<f32, bf16>(&inp));
    assert!(out.iter().zip(&inp).all(|(y, &x)| *y == bf16::from_f32(x)));
    same_on_any_threads(|| cast::<bf16, f32>(&out));
}

#[test]
fn what_does_not_fit_is_refused() {
    let call = |t: &mut [Any]| -> Result<()> {
        let [out, inp] = t else { unreachable!() };
        forward(&cpu(), Forward { out: out.view_mut(), inp: inp.view() })
    };
    let args = [arg("out", DType::Bf16, &[3, 5]), arg("inp", DType::F32, &[3, 5])];
    for (name, dtype, blamed) in [
        ("inp", DType::F64, "inp"),
        ("inp", DType::Bf16, "out"),
        ("out", DType::F32, "out"),
        ("out", DType::U8, "out"),
    ] {
        match refusal(&args, &call, name, Any::new(dtype, &[3, 5])) {
            Error::DType { op: "cast", arg, .. } => assert_eq!(arg, blamed),
            err => panic!("{err}"),
        }
    }
    let err = refusal(&args, &call, "inp", Any::new(DType::I32, &[3, 5]));
    assert_eq!(err.to_string(), "cast: `inp` has dtype I32, expected F32 or Bf16");
    for shape in [&[5, 3][..], &[15], &[3, 6], &[0, 5]] {
        let err = refusal(&args, &call, "inp", Any::new(DType::F32, shape));
        assert!(matches!(err, Error::Shape { op: "cast", arg: "out", .. }), "{err}");
    }
}
