//! The gradient of the whole network against finite differences, and what its loss does not depend on.

use pixmim::TensorList;
use pixmim::model::activations::{Batch, workspace_bytes};
use pixmim::model::{Activations, Mae, MaeConfig, Scratch};
use pixmim::ops::masked_mse_loss;
use pixmim::{Arena, DType, Device, Tensor, TensorMut, TensorRef};

use crate::golden::hashed;

/// Odd sizes, no two alike: 9 patches of 27 numbers.
const CONFIG: MaeConfig = MaeConfig {
    image_size: 9,
    patch_size: 3,
    dim: 12,
    depth: 2,
    heads: 3,
    decoder_dim: 8,
    decoder_depth: 1,
    decoder_heads: 2,
    mlp_ratio: 5,
};
const PATCHES: usize = 9;
const NUMBERS: usize = 27;
const IMAGES: usize = 2;

/// A network in f64 with hashed weights, patches and targets; the first `kept` of each order are seen.
struct Net {
    dev: Device,
    mae: Mae,
    batch: Batch,
    acts: Activations,
    scratch: Scratch,
    grads: TensorList,
    target: Vec<f64>,
    workspace: Tensor,
    norm_pix: bool,
}

impl Net {
    fn new(orders: [[i32; PATCHES]; IMAGES], kept: usize, norm_pix: bool) -> Self {
        let mut mae = Mae::new(&Device::cpu(), CONFIG, DType::F64, 0).unwrap();
        let specs = mae.table().specs().to_vec();
        for (i, spec) in specs.iter().enumerate() {
            let [tensor] = mae.weights.views_mut([i]);
            for (e, x) in tensor.into_slice::<f64>().iter_mut().enumerate() {
                let v = hashed(&spec.name, e as u64) - 0.5;
                *x = if spec.name.contains("norm") { 1.0 + v } else { v };
            }
        }
        let batch = Batch { images: IMAGES, kept, predicted: PATCHES - kept };
        let needed = workspace_bytes(&Device::cpu(), DType::F64, &CONFIG, batch);
        let ((mut acts, scratch, workspace), _) = Arena::build(&Device::cpu(), "test", |arena| {
            (
                Activations::new(arena, DType::F64, &CONFIG, batch),
                Scratch::new(arena, DType::F64, &CONFIG, batch),
                arena.tensor(DType::U8, &[needed]),
            )
        })
        .unwrap();
        // What a patch looks like depends on the patch, not on where it stands.
        let pixels = |name: &str, b: usize, id: i32| {
            let first = ((b * PATCHES + id as usize) * NUMBERS) as u64;
            let name = name.to_owned();
            (0..NUMBERS as u64).map(move |e| 3.0 * hashed(&name, first + e) - 1.5)
        };
        let mut target = Vec::new();
        for (b, order) in orders.iter().enumerate() {
            let (keep, masked) = order.split_at(kept);
            acts.ids_keep.view_mut().into_slice::<i32>()[b * kept..][..kept].copy_from_slice(keep);
            let predicted = PATCHES - kept;
            acts.ids_predicted.view_mut().into_slice::<i32>()[b * predicted..][..predicted]
                .copy_from_slice(masked);
            let restore = acts.ids_restore.view_mut().into_slice::<i32>();
            for (place, &id) in order.iter().enumerate() {
                restore[b * PATCHES + id as usize] = place as i32;
            }
            let seen: Vec<f64> = keep.iter().flat_map(|&id| pixels("image", b, id)).collect();
            acts.patches.view_mut().into_slice::<f64>()[b * seen.len()..][..seen.len()]
                .copy_from_slice(&seen);
            target.extend(masked.iter().flat_map(|&id| pixels("target", b, id)));
        }
        let (grads, _) = mae.like_weights(&Device::cpu(), "gradients").unwrap();
        let dev = Device::cpu();
        Self { dev, mae, batch, acts, scratch, grads, target, workspace, norm_pix }
    }

    /// Forward pass and loss.
    fn loss(&mut self) -> f64 {
        let mut loss = [0.0];
        self.mae.forward(&self.dev, &mut self.acts, &mut self.workspace).unwrap();
        let shape = [IMAGES, self.batch.predicted, NUMBERS];
        masked_mse_loss::forward_backward(
            &self.dev,
            masked_mse_loss::ForwardBackward {
                loss: TensorMut::new(&mut loss, &[1]).unwrap(),
                grad_pred: self.scratch.grad_pred.view_mut(),
                pred: self.acts.pred.view(),
                target: TensorRef::new(&self.target, &shape).unwrap(),
                norm_pix: self.norm_pix,
                scale: 1.0,
                workspace: self.workspace.view_mut(),
            },
        )
        .unwrap();
        loss[0]
    }

    /// The backward pass after [`Self::loss`]; adds to `grads`.
    fn backward(&mut self) {
        let (grads, scratch) = (&mut self.grads, &mut self.scratch);
        self.mae.backward(&self.dev, &self.acts, grads, scratch, &mut self.workspace).unwrap();
    }

    /// Name and gradient of each tensor.
    fn gradients(&self) -> Vec<(String, Vec<f64>)> {
        let specs = self.mae.table().specs().iter().enumerate();
        specs.map(|(i, s)| (s.name.clone(), self.grads.view(i).as_slice().to_vec())).collect()
    }

    fn weight(&mut self, tensor: usize, element: usize) -> &mut f64 {
        let [weights] = self.mae.weights.views_mut([tensor]);
        &mut weights.into_slice::<f64>()[element]
    }
}

/// The two images are masked differently.
const ORDERS: [[i32; PATCHES]; IMAGES] = [[5, 2, 8, 1, 0, 7, 3, 6, 4], [0, 6, 3, 7, 8, 1, 4, 2, 5]];

#[test]
fn every_gradient_is_the_slope_of_the_loss() {
    // So small a network is slower on more threads.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        check_slopes(4, true, 1);
        check_slopes(1, false, 5);
        check_slopes(8, true, 5);
    });
}

/// Compares every `stride`-th number of the gradient.
fn check_slopes(kept: usize, norm_pix: bool, stride: usize) {
    const STEP: f64 = 1e-5;
    let mut net = Net::new(ORDERS, kept, norm_pix);
    net.loss();
    net.backward();
    for (tensor, (name, gradient)) in net.gradients().into_iter().enumerate() {
        for (element, gradient) in gradient.into_iter().enumerate().step_by(stride) {
            let value = *net.weight(tensor, element);
            let mut loss_at = |x: f64| {
                *net.weight(tensor, element) = x;
                net.loss()
            };
            let slope = (loss_at(value + STEP) - loss_at(value - STEP)) / (2.0 * STEP);
            *net.weight(tensor, element) = value;
            let error = (slope - gradient).abs();
            assert!(
                error <= 1e-8 + 1e-6 * gradient.abs(),
                "{name}[{element}], {kept} kept: gradient {gradient}, slope {slope}"
            );
        }
    }
}

#[test]
fn every_tensor_has_a_gradient_and_it_accumulates() {
    let mut net = Net::new(ORDERS, 4, true);
    net.loss();
    net.backward();
    let once = net.gradients();
    net.backward();
    for ((name, once), (_, twice)) in once.into_iter().zip(net.gradients()) {
        assert!(once.iter().any(|g| g.abs() > 1e-6), "{name} has no gradient");
        for (once, twice) in once.into_iter().zip(twice) {
            assert!((twice - 2.0 * once).abs() <= 1e-12, "{name}: {once}, then {twice}");
        }
    }
}

/// The encoder knows its tokens by their positions alone, the loss is a mean over patches: the order in which patches are
/// listed is nobody's business.
#[test]
fn the_order_of_kept_and_of_masked_patches_changes_neither_loss_nor_gradients() {
    const KEPT: usize = 4;
    let run = |orders| {
        let mut net = Net::new(orders, KEPT, true);
        let loss = net.loss();
        net.backward();
        (loss, net.gradients())
    };
    let (loss, gradients) = run(ORDERS);
    let rotated = |from: usize, to: usize, by: usize| {
        ORDERS.map(|mut order| {
            order[from..to].rotate_left(by);
            order
        })
    };
    let sorted = ORDERS.map(|mut order| {
        order[..KEPT].sort_unstable();
        order[KEPT..].sort_unstable();
        order
    });
    for orders in [rotated(0, KEPT, 1), rotated(KEPT, PATCHES, 2), sorted] {
        assert_ne!(orders, ORDERS);
        let (other_loss, other_gradients) = run(orders);
        assert!((loss - other_loss).abs() <= 1e-13 * loss, "{loss}, {other_loss}");
        for ((name, a), (_, b)) in gradients.iter().zip(&other_gradients) {
            for (a, b) in a.iter().zip(b) {
                assert!((a - b).abs() <= 1e-13, "{name}: {a}, {b}");
            }
        }
    }
    // Another choice of patches is another loss.
    let (other_loss, _) = run(rotated(0, PATCHES, 1));
    assert!((loss - other_loss).abs() > 1e-4 * loss, "{loss}, {other_loss}");
}
