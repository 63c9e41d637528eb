//! The fully connected layer on a GPU: its epilogues, its gradients, the sums of columns.

use half::bf16;
use pixmim::ops::gelu;
use pixmim::ops::linear::{
    Backward, Epilogue, Forward, GradInput, backward, forward, workspace_bytes,
};
use pixmim::{DType, Device, Error, TensorMut, TensorRef};

use crate::common::{
    Input, Output, Stored, close_as_naive, gpu, same_on_any_schedule, uniform, unit_roundoff,
    widen, workspace,
};

mod epilogues;

#[derive(Clone, Copy, Debug, PartialEq)]
enum After {
    Nothing,
    Gelu,
    Residual,
}

struct Layer<T> {
    size: [usize; 3],
    inp: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
    residual: Vec<T>,
    grad_out: Vec<T>,
    /// Input of the GELU before this layer.
    pre: Vec<T>,
    weight_before: Vec<f32>,
    bias_before: Vec<f32>,
}

impl<T: Stored> Layer<T> {
    fn new(size @ [rows, inputs, outputs]: [usize; 3]) -> Self {
        Self {
            size,
            inp: uniform(1, rows * inputs),
            weight: uniform(2, outputs * inputs),
            bias: uniform(3, outputs),
            residual: uniform(4, rows * outputs),
            grad_out: uniform(5, rows * outputs),
            pre: uniform(6, rows * inputs),
            weight_before: uniform(7, outputs * inputs),
            bias_before: uniform(8, outputs),
        }
    }

    /// The output, and what GELU got.
    fn forward(&self, dev: &Device, after: After) -> [Vec<f64>; 2] {
        let [rows, inputs, outputs] = self.size;
        let wide = [rows, outputs];
        let inp = Input::new(dev, &self.inp, &[rows, inputs]);
        let weight = Input::new(dev, &self.weight, &[outputs, inputs]);
        let bias = Input::new(dev, &self.bias, &[outputs]);
        let residual = Input::new(dev, &self.residual, &wide);
        let mut out = Output::new(dev, T::DTYPE, &wide);
        let mut pre = Output::new(dev, T::DTYPE, &wide);
        let epilogue = match after {
            After::Nothing => Epilogue::None,
            After::Gelu => Epilogue::Gelu(pre.view()),
            After::Residual => Epilogue::Residual(residual.view()),
        };
        let (inp, weight, bias) = (inp.view(), weight.view(), bias.view());
        forward(dev, Forward { out: out.view(), inp, weight, bias, epilogue }).unwrap();
        let pre = if after == After::Gelu { widen(&pre.values::<T>()) } else { vec![] };
        [widen(&out.values::<T>()), pre]
    }

    /// Gradients of input, weight and bias.
    fn backward(&self, dev: &Device, through_gelu: bool) -> [Vec<f64>; 3] {
        let [rows, inputs, outputs] = self.size;
        let inp = Input::new(dev, &self.inp, &[rows, inputs]);
        let weight = Input::new(dev, &self.weight, &[outputs, inputs]);
        let grad_out = Input::new(dev, &self.grad_out, &[rows, outputs]);
        let pre = Input::new(dev, &self.pre, &[rows, inputs]);
        let mut grad_inp = Output::new(dev, T::DTYPE, &[rows, inputs]);
        let mut grad_weight = Output::holding(dev, &self.weight_before, &[outputs, inputs]);
        let mut grad_bias = Output::holding(dev, &self.bias_before, &[outputs]);
        let mut work = workspace(dev, workspace_bytes(dev, rows, outputs));
        let grad = grad_inp.view();
        let args = Backward {
            grad_inp: match through_gelu {
                true => GradInput::Gelu { grad, pre: pre.view() },
                false => GradInput::Plain(grad),
            },
            grad_weight: grad_weight.view(),
            grad_bias: grad_bias.view(),
            grad_out: grad_out.view(),
            inp: inp.view(),
            weight: weight.view(),
            workspace: work.view(),
        };
        backward(dev, args).unwrap();
        [
            widen(&grad_inp.values::<T>()),
            widen(&grad_weight.values::<f32>()),
            widen(&grad_bias.values::<f32>()),
        ]
    }

    /// As both, written down in f32, stored as `T` wherever a tensor is.
    fn naive(&self, after: After, through_gelu: bool) -> [Vec<f64>; 5] {
        let [rows, inputs, outputs] = self.size;
        let f32s = |x: &[T]| -> Vec<f32> { x.iter().map(|x| x.f64() as f32).collect() };
        let [inp, weight, bias] = [&self.inp, &self.weight, &self.bias].map(|x| f32s(x));
        let [residual, grad_out] = [&self.residual, &self.grad_out].map(|x| f32s(x));
        let store = |x: f32| T::round(f64::from(x)).f64();
        let [mut out, mut grad_inp] = [vec![], vec![]];
        let (mut grad_weight, mut grad_bias) =
            (self.weight_before.clone(), self.bias_before.clone());
        for r in 0..rows {
            let x = &inp[r * inputs..][..inputs];
            for n in 0..outputs {
                let product: f32 =
                    x.iter().zip(&weight[n * inputs..]).map(|(x, w)| x * w).sum::<f32>() + bias[n];
                out.push(match after {
                    After::Residual => store(product + residual[r * outputs + n]),
                    _ => store(product),
                });
                let g = grad_out[r * outputs + n];
                grad_bias[n] += g;
                for (grad, x) in grad_weight[n * inputs..].iter_mut().zip(x) {
                    *grad += g * x;
                }
            }
            for k in 0..inputs {
                let g = &grad_out[r * outputs..][..outputs];
                let products = g.iter().enumerate().map(|(n, g)| g * weight[n * inputs + k]);
                grad_inp.push(store(products.sum::<f32>()));
            }
        }
        let pre = out.clone();
        if after == After::Gelu {
            let [values, _] = gelu_and_slope(&pre);
            out = values.into_iter().map(|x| T::round(x).f64()).collect();
        }
        if through_gelu {
            let [_, slopes] = gelu_and_slope(&widen(&self.pre));
            let grads = grad_inp.iter().zip(slopes);
            grad_inp = grads.map(|(g, slope)| T::round(g * slope).f64()).collect();
        }
        [out, pre, grad_inp, widen(&grad_weight), widen(&grad_bias)]
    }

    /// The CPU side in f64, on the same numbers.
    fn exact(&self, after: After, through_gelu: bool) -> [Vec<f64>; 5] {
        let ([rows, inputs, outputs], dev) = (self.size, Device::cpu());
        let [inp, weight, bias] = [&self.inp, &self.weight, &self.bias].map(|x| widen(x));
        let [residual, grad_out, kept] =
            [&self.residual, &self.grad_out, &self.pre].map(|x| widen(x));
        let wide = [rows, outputs];
        let [mut out, mut pre] = [(); 2].map(|()| vec![0.0; rows * outputs]);
        let inp = TensorRef::new(&inp, &[rows, inputs]).unwrap();
        let weight = TensorRef::new(&weight, &[outputs, inputs]).unwrap();
        let epilogue = match after {
            After::Nothing => Epilogue::None,
            After::Gelu => Epilogue::Gelu(TensorMut::new(&mut pre, &wide).unwrap()),
            After::Residual => Epilogue::Residual(TensorRef::new(&residual, &wide).unwrap()),
        };
        let args = Forward {
            out: TensorMut::new(&mut out, &wide).unwrap(),
            inp,
            weight,
            bias: TensorRef::new(&bias, &[outputs]).unwrap(),
            epilogue,
        };
        forward(&dev, args).unwrap();
        let mut grad_inp = vec![0.0; rows * inputs];
        let (mut grad_weight, mut grad_bias) =
            (widen(&self.weight_before), widen(&self.bias_before));
        let grad = TensorMut::new(&mut grad_inp, &[rows, inputs]).unwrap();
        let args = Backward {
            grad_inp: match through_gelu {
                true => {
                    GradInput::Gelu { grad, pre: TensorRef::new(&kept, &[rows, inputs]).unwrap() }
                }
                false => GradInput::Plain(grad),
            },
            grad_weight: TensorMut::new(&mut grad_weight, &[outputs, inputs]).unwrap(),
            grad_bias: TensorMut::new(&mut grad_bias, &[outputs]).unwrap(),
            grad_out: TensorRef::new(&grad_out, &wide).unwrap(),
            inp,
            weight,
            workspace: TensorMut::new::<u8>(&mut [], &[0]).unwrap(),
        };
        backward(&dev, args).unwrap();
        [out, pre, grad_inp, grad_weight, grad_bias]
    }

    #[track_caller]
    fn check(&self, after: After) {
        self.check_on(&gpu(), after);
    }

    #[track_caller]
    fn check_on(&self, dev: &Device, after: After) {
        let [_, inputs, outputs] = self.size;
        let through_gelu = after == After::Gelu;
        let ([out, pre], grads) = (self.forward(dev, after), self.backward(dev, through_gelu));
        let naive = self.naive(after, through_gelu);
        let exact = self.exact(after, through_gelu);
        let (stored, single) = (unit_roundoff::<T>(), unit_roundoff::<f32>());
        let [grad_inp, grad_weight, grad_bias] = grads;
        for (i, (name, got, width, floor)) in [
            ("out", out, outputs, stored),
            ("pre", pre, outputs, stored),
            ("grad_inp", grad_inp, inputs, stored),
            ("grad_weight", grad_weight, inputs, single),
            ("grad_bias", grad_bias, outputs, single),
        ]
        .into_iter()
        .enumerate()
        {
            if name == "pre" && !through_gelu {
                continue;
            }
            let name = format!("{name} of {:?}, {after:?}, {:?}", self.size, T::DTYPE);
            close_as_naive(&name, &got, &naive[i], &exact[i], width, floor);
        }
    }
}

/// GELU and its slope, in f64.
fn gelu_and_slope(inp: &[f64]) -> [Vec<f64>; 2] {
    let shape = [inp.len()];
    let [mut value, mut slope] = [(); 2].map(|()| vec![0.0; inp.len()]);
    let (inp, ones) = (TensorRef::new(inp, &shape).unwrap(), vec![1.0; inp.len()]);
    let out = TensorMut::new(&mut value, &shape).unwrap();
    gelu::forward(&Device::cpu(), gelu::Forward { out, inp }).unwrap();
    let grad_inp = TensorMut::new(&mut slope, &shape).unwrap();
    let grad_out = TensorRef::new(&ones, &shape).unwrap();
    gelu::backward(&Device::cpu(), gelu::Backward { grad_inp, grad_out, inp }).unwrap();
    [value, slope]
}

#[test]
fn values_and_gradients_are_as_exact_as_the_naive_ones_with_each_epilogue() {
    for after in [After::Nothing, After::Gelu, After::Residual] {
        for size in [[1, 8, 8], [7, 24, 72], [49, 40, 264]] {
            Layer::<f32>::new(size).check(after);
            Layer::<bf16>::new(size).check(after);
        }
    }
}

#[test]
fn the_bias_gradient_sums_any_number_of_rows() {
    // One slab that ends inside a turn of four rows; several, the last one short; as many as there are blocks.
    for size in [[33, 8, 8], [257, 8, 520], [2111, 8, 24]] {
        Layer::<f32>::new(size).check(After::Nothing);
        Layer::<bf16>::new(size).check(After::Nothing);
    }
    Layer::<bf16>::new([528 * 32 + 77, 8, 8]).check(After::Nothing);
}

#[test]
fn schedules_change_no_bit() {
    let layer = Layer::<bf16>::new([197, 16, 40]);
    same_on_any_schedule(|dev| {
        let ([out, pre], grads) = (layer.forward(dev, After::Gelu), layer.backward(dev, true));
        [vec![out, pre], grads.to_vec()].concat().concat()
    });
}

#[test]
fn the_gradient_of_the_input_may_be_left_out() {
    let (dev, layer) = (gpu(), Layer::<bf16>::new([50, 16, 24]));
    let inp = Input::new(&dev, &layer.inp, &[50, 16]);
    let weight = Input::new(&dev, &layer.weight, &[24, 16]);
    let grad_out = Input::new(&dev, &layer.grad_out, &[50, 24]);
    let mut grad_weight = Output::holding(&dev, &layer.weight_before, &[24, 16]);
    let mut grad_bias = Output::holding(&dev, &layer.bias_before, &[24]);
    let mut work = workspace(&dev, workspace_bytes(&dev, 50, 24));
    let args = Backward {
        grad_inp: GradInput::None,
        grad_weight: grad_weight.view(),
        grad_bias: grad_bias.view(),
        grad_out: grad_out.view(),
        inp: inp.view(),
        weight: weight.view(),
        workspace: work.view(),
    };
    backward(&dev, args).unwrap();
    let [_, want_weight, want_bias] = layer.backward(&dev, false);
    assert_eq!(widen(&grad_weight.values::<f32>()), want_weight);
    assert_eq!(widen(&grad_bias.values::<f32>()), want_bias);
}

/// What is said of a layer of this size and dtype, in memory of `home`.
fn refusal(
    dev: &Device,
    home: &Device,
    dtype: DType,
    [rows, inputs, outputs]: [usize; 3],
) -> Error {
    let tensor = |shape: &[usize]| Output::new(home, dtype, shape);
    let (mut out, mut inp) = (tensor(&[rows, outputs]), tensor(&[rows, inputs]));
    let (mut weight, mut bias) = (tensor(&[outputs, inputs]), tensor(&[outputs]));
    let args = Forward {
        out: out.view(),
        inp: inp.as_ref(),
        weight: weight.as_ref(),
        bias: bias.as_ref(),
        epilogue: Epilogue::None,
    };
    forward(dev, args).unwrap_err()
}

#[test]
fn what_a_gpu_cannot_do_is_refused() {
    let dev = gpu();
    for size in [[3, 14, 8], [3, 8, 14]] {
        let err = refusal(&dev, &dev, DType::Bf16, size);
        assert!(err.to_string().contains("a multiple of 4"), "{err}");
    }
    assert!(matches!(refusal(&dev, &dev, DType::F64, [3, 8, 8]), Error::DType { .. }));
    let err = refusal(&dev, &Device::cpu(), DType::F32, [3, 8, 8]);
    assert!(matches!(err, Error::Place { .. }), "{err}");
}
