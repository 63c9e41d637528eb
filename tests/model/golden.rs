//! The tiny network of the golden values: weights, image and noise are hashes of names, so that any language can make
//! them. The numbers were computed with three programs (numpy, the original MAE in PyTorch f64, Hugging Face's
//! `ViTMAE`), whose losses agree to 1e-9.

use pixmim::model::activations::{Batch, workspace_bytes};
use pixmim::model::{Activations, Mae, MaeConfig, Scratch};
use pixmim::ops::low_freq_target::{self, Filter};
use pixmim::ops::{adamw, grad_norm, masked_mse_loss, random_masking};
use pixmim::{Arena, DType, Device, Tensor, TensorMut, TensorRef};

/// Image 8, patch 2: 16 patches, 4 kept.
pub(crate) const CONFIG: MaeConfig = MaeConfig {
    image_size: 8,
    patch_size: 2,
    dim: 16,
    depth: 2,
    heads: 4,
    decoder_dim: 8,
    decoder_depth: 1,
    decoder_heads: 2,
    mlp_ratio: 4,
};
pub(crate) const BATCH: Batch = Batch { images: 2, kept: 4, predicted: 12 };
const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const STD: [f64; 3] = [0.229, 0.224, 0.225];

/// L2 norm and first two entries of each gradient of the loss with `norm_pix` and r = 2.
pub(crate) const GRADIENTS: [(&str, f64, [f64; 2]); 48] = [
    ("cls_token", 0.0406682325, [-0.0078457126, -0.0046218498]),
    ("patch_embed.proj.weight", 0.1045968957, [-0.0031348160, 0.0028953201]),
    ("patch_embed.proj.bias", 0.0326000686, [-0.0022416477, -0.0083759473]),
    ("blocks.0.norm1.weight", 0.0282484397, [-0.0005056033, 0.0076292613]),
    ("blocks.0.norm1.bias", 0.0372192328, [-0.0039829050, -0.0101756763]),
    ("blocks.0.attn.qkv.weight", 0.1130069379, [0.0001195132, 0.0001168866]),
    ("blocks.0.attn.qkv.bias", 0.0351277709, [0.0003431258, 0.0005075507]),
    ("blocks.0.attn.proj.weight", 0.1431378016, [0.0021153835, -0.0029617162]),
    ("blocks.0.attn.proj.bias", 0.0350506680, [-0.0043383017, -0.0051881680]),
    ("blocks.0.norm2.weight", 0.0518712873, [0.0036578630, 0.0083790609]),
    ("blocks.0.norm2.bias", 0.0408722638, [-0.0023589890, -0.0083281397]),
    ("blocks.0.mlp.fc1.weight", 0.1356261813, [0.0006234794, -0.0006939714]),
    ("blocks.0.mlp.fc1.bias", 0.0442942345, [0.0005963221, 0.0040919353]),
    ("blocks.0.mlp.fc2.weight", 0.1527313096, [0.0003323050, 0.0003402416]),
    ("blocks.0.mlp.fc2.bias", 0.0309027654, [-0.0055318931, 0.0001278030]),
    ("blocks.1.norm1.weight", 0.0383782063, [-0.0008954734, -0.0006505632]),
    ("blocks.1.norm1.bias", 0.0436888303, [-0.0025422031, -0.0041536340]),
    ("blocks.1.attn.qkv.weight", 0.1338503585, [0.0013481917, -0.0024033988]),
    ("blocks.1.attn.qkv.bias", 0.0360774877, [0.0009441918, -0.0004339034]),
    ("blocks.1.attn.proj.weight", 0.1613500264, [-0.0075865196, 0.0039439117]),
    ("blocks.1.attn.proj.bias", 0.0353971045, [-0.0048311480, 0.0031972574]),
    ("blocks.1.norm2.weight", 0.0300909967, [0.0018734022, 0.0068620856]),
    ("blocks.1.norm2.bias", 0.0623751223, [0.0032974087, -0.0081292823]),
    ("blocks.1.mlp.fc1.weight", 0.2284887186, [0.0006886282, -0.0002365248]),
    ("blocks.1.mlp.fc1.bias", 0.0611096573, [0.0007636062, 0.0051703107]),
    ("blocks.1.mlp.fc2.weight", 0.2201072191, [0.0006168344, -0.0067024749]),
    ("blocks.1.mlp.fc2.bias", 0.0305290392, [-0.0072005269, 0.0067145527]),
    ("norm.weight", 0.0519442537, [-0.0002664929, -0.0046345023]),
    ("norm.bias", 0.1072008055, [-0.0197535380, 0.0237244943]),
    ("decoder_embed.weight", 0.3078055659, [-0.0212263977, 0.0181208359]),
    ("decoder_embed.bias", 0.0887036849, [-0.0182230016, 0.0541511650]),
    ("mask_token", 0.5924327042, [-0.1474722902, -0.2570543129]),
    ("decoder_blocks.0.norm1.weight", 0.3578603309, [0.0769477994, -0.0597879879]),
    ("decoder_blocks.0.norm1.bias", 0.4227363550, [-0.1518455401, 0.0923737989]),
    ("decoder_blocks.0.attn.qkv.weight", 1.2445929341, [0.0009060988, 0.0021728403]),
    ("decoder_blocks.0.attn.qkv.bias", 0.4690009173, [-0.0021439118, 0.0012917105]),
    ("decoder_blocks.0.attn.proj.weight", 1.6067138659, [0.1133504804, 0.0082469602]),
    ("decoder_blocks.0.attn.proj.bias", 0.7682739973, [-0.1123455832, -0.3943268802]),
    ("decoder_blocks.0.norm2.weight", 0.3268488729, [0.0244644804, 0.0046015177]),
    ("decoder_blocks.0.norm2.bias", 0.3676184462, [0.0367186309, -0.0952606262]),
    ("decoder_blocks.0.mlp.fc1.weight", 0.9801816812, [-0.0420744866, 0.0523600610]),
    ("decoder_blocks.0.mlp.fc1.bias", 0.3611043831, [-0.0922897808, 0.0267862901]),
    ("decoder_blocks.0.mlp.fc2.weight", 1.3268520728, [-0.0270060700, -0.0800943138]),
    ("decoder_blocks.0.mlp.fc2.bias", 0.4103856213, [-0.1269429416, -0.2242300557]),
    ("decoder_norm.weight", 0.7582689213, [0.0155645741, -0.0264216554]),
    ("decoder_norm.bias", 0.5937926638, [-0.0573601951, -0.1403725509]),
    ("decoder_pred.weight", 1.4687806366, [0.0146246736, -0.0002410237]),
    ("decoder_pred.bias", 0.4918777091, [-0.0499586468, 0.2033637289]),
];

/// Number `index` of the hash sequence of `name`, on [0, 1).
pub(crate) fn hashed(name: &str, index: u64) -> f64 {
    let fnv = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut z = fnv.wrapping_add(index).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Where the order of the patches comes from.
pub(crate) enum Order {
    /// Hashed noise.
    Noise,
    /// Both images in this order.
    Given([i32; 16]),
}

/// The network with all it needs for a step, in one dtype.
pub(crate) struct Tiny {
    pub(crate) dev: Device,
    pub(crate) mae: Mae,
    pub(crate) acts: Activations,
    pub(crate) scratch: Scratch,
    pub(crate) grads: pixmim::TensorList,
    pub(crate) target: Vec<f64>,
    workspace: Tensor,
}

impl Tiny {
    /// Weights, image and masks of the golden values, in f64; the target filtered or not.
    pub(crate) fn new(order: &Order, radius: Option<f64>) -> Self {
        let dev = Device::cpu();
        let mut mae = Mae::new(&Device::cpu(), CONFIG, DType::F64, 0).unwrap();
        let specs = mae.table().specs().to_vec();
        for (i, spec) in specs.iter().enumerate() {
            let [tensor] = mae.weights.views_mut([i]);
            for (e, x) in tensor.into_slice::<f64>().iter_mut().enumerate() {
                let v = 0.5 * (2.0 * hashed(&spec.name, e as u64) - 1.0);
                let scale = spec.name.contains("norm") && spec.name.ends_with("weight");
                *x = if scale { 1.0 + 0.5 * v } else { v };
            }
        }
        let pixels: Vec<f64> = (0..2 * 3 * 64).map(|i| hashed("image", i)).collect();
        let needed = workspace_bytes(&Device::cpu(), DType::F64, &CONFIG, BATCH).max(1 << 20);
        let ((mut acts, scratch, mut workspace), _) =
            Arena::build(&Device::cpu(), "test", |arena| {
                (
                    Activations::new(arena, DType::F64, &CONFIG, BATCH),
                    Scratch::new(arena, DType::F64, &CONFIG, BATCH),
                    arena.tensor(DType::U8, &[needed]),
                )
            })
            .unwrap();
        match order {
            Order::Noise => {
                let noise: Vec<f64> = (0..32).map(|i| hashed("noise", i)).collect();
                random_masking::forward(
                    &dev,
                    random_masking::Forward {
                        ids_keep: acts.ids_keep.view_mut(),
                        ids_masked: acts.ids_predicted.view_mut(),
                        ids_restore: acts.ids_restore.view_mut(),
                        noise: random_masking::Noise::Given(
                            TensorRef::new(&noise, &[2, 16]).unwrap(),
                        ),
                        block: 1,
                        workspace: workspace.view_mut(),
                    },
                )
                .unwrap();
            }
            Order::Given(order) => {
                for b in 0..2 {
                    let keep = &mut acts.ids_keep.view_mut().into_slice::<i32>()[b * 4..][..4];
                    keep.copy_from_slice(&order[..4]);
                    let masked = acts.ids_predicted.view_mut().into_slice::<i32>();
                    masked[b * 12..][..12].copy_from_slice(&order[4..]);
                    let restore = acts.ids_restore.view_mut().into_slice::<i32>();
                    for (place, &patch) in order.iter().enumerate() {
                        restore[b * 16 + patch as usize] = place as i32;
                    }
                }
            }
        }
        let normal = |b: usize, c: usize, y: usize, x: usize| {
            (pixels[((b * 3 + c) * 8 + y) * 8 + x] - MEAN[c]) / STD[c]
        };
        let ids_keep = acts.ids_keep.view().as_slice::<i32>().to_vec();
        let patches = acts.patches.view_mut().into_slice::<f64>();
        for (i, out) in patches.iter_mut().enumerate() {
            let (row, e) = (i / 12, i % 12);
            let (id, c, y, x) = (ids_keep[row] as usize, e / 4, e / 2 % 2, e % 2);
            *out = normal(row / 4, c, id / 4 * 2 + y, id % 4 * 2 + x);
        }
        let mut target = vec![f64::NAN; 2 * 12 * 12];
        let ids_masked = acts.ids_predicted.view();
        if let Some(radius) = radius {
            low_freq_target::forward(
                &dev,
                low_freq_target::Forward {
                    target: TensorMut::new(&mut target, &[2, 12, 12]).unwrap(),
                    pixels: TensorRef::new(&pixels, &[2, 3, 8, 8]).unwrap(),
                    ids_masked,
                    filter: &Filter::new(&dev, 8, radius).unwrap(),
                    mean: MEAN,
                    std: STD,
                    patch_size: 2,
                    exact: true,
                    workspace: workspace.view_mut(),
                },
            )
            .unwrap();
        } else {
            for (i, out) in target.iter_mut().enumerate() {
                let (row, e) = (i / 12, i % 12);
                let id = ids_masked.as_slice::<i32>()[row] as usize;
                let (y, x, c) = (e / 6, e / 3 % 2, e % 3);
                *out = normal(row / 12, c, id / 4 * 2 + y, id % 4 * 2 + x);
            }
        }
        let (grads, _) = mae.like_weights(&Device::cpu(), "gradients").unwrap();
        Self { dev, mae, acts, scratch, grads, target, workspace }
    }

    /// One forward and backward pass; gradients are set to zero first. Returns the loss.
    pub(crate) fn step(&mut self, norm_pix: bool) -> f64 {
        self.dev.clear(self.grads.flat_mut()).unwrap();
        let mut loss = [0.0];
        self.mae.forward(&self.dev, &mut self.acts, &mut self.workspace).unwrap();
        masked_mse_loss::forward_backward(
            &self.dev,
            masked_mse_loss::ForwardBackward {
                loss: TensorMut::new(&mut loss, &[1]).unwrap(),
                grad_pred: self.scratch.grad_pred.view_mut(),
                pred: self.acts.pred.view(),
                target: TensorRef::new(&self.target, &[2, 12, 12]).unwrap(),
                norm_pix,
                scale: 1.0,
                workspace: self.workspace.view_mut(),
            },
        )
        .unwrap();
        let (grads, scratch) = (&mut self.grads, &mut self.scratch);
        self.mae.backward(&self.dev, &self.acts, grads, scratch, &mut self.workspace).unwrap();
        loss[0]
    }

    /// The gradient's norm, from the op.
    pub(crate) fn grad_norm(&mut self) -> f64 {
        let mut norm = [f64::NAN];
        grad_norm::forward(
            &self.dev,
            grad_norm::Forward {
                norm: TensorMut::new(&mut norm, &[1]).unwrap(),
                grad: self.grads.flat(),
                workspace: self.workspace.view_mut(),
            },
        )
        .unwrap();
        norm[0]
    }

    /// Index of a tensor.
    pub(crate) fn index(&self, name: &str) -> usize {
        let specs = self.mae.table().specs();
        specs.iter().position(|spec| spec.name == name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// AdamW as in MAE's source (tokens decay), on moments as long as the flat weights.
    pub(crate) fn update(&mut self, moments: &mut [Vec<f64>; 2], step: i64) {
        let norm = [self.grad_norm()];
        let (mut updates, mut coefficients) = ([step - 1], [f64::NAN; adamw::COEFFICIENTS]);
        let prepare = adamw::Prepare {
            coefficients: TensorMut::new(&mut coefficients, &[adamw::COEFFICIENTS]).unwrap(),
            step: TensorMut::new(&mut updates, &[1]).unwrap(),
            lr: TensorRef::new(&[0.01], &[1]).unwrap(),
            loss: TensorRef::new(&[1.0], &[1]).unwrap(),
            grad_norm: TensorRef::new(&norm, &[1]).unwrap(),
            clip: 0.0,
            betas: [0.9, 0.95],
        };
        adamw::prepare(&self.dev, prepare).unwrap();
        assert_eq!(updates, [step]);
        let decaying = self.mae.table().decaying(true);
        let split = self.mae.weights.offset(decaying);
        let all = self.grads.flat().elems();
        let grads = self.grads.flat().as_slice::<f64>();
        let weights = self.mae.weights.flat_mut().into_slice::<f64>();
        let [exp_avg, exp_avg_sq] = moments;
        for (range, weight_decay) in [(0..split, 0.05), (split..all, 0.0)] {
            let shape = [range.len()];
            adamw::update(
                &self.dev,
                adamw::Update {
                    copy: None,
                    param: TensorMut::new(&mut weights[range.clone()], &shape).unwrap(),
                    exp_avg: TensorMut::new(&mut exp_avg[range.clone()], &shape).unwrap(),
                    exp_avg_sq: TensorMut::new(&mut exp_avg_sq[range.clone()], &shape).unwrap(),
                    grad: TensorRef::new(&grads[range], &shape).unwrap(),
                    coefficients: TensorRef::new(&coefficients, &[adamw::COEFFICIENTS]).unwrap(),
                    betas: [0.9, 0.95],
                    eps: 1e-8,
                    weight_decay,
                },
            )
            .unwrap();
        }
    }
}
