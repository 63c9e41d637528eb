//! The whole training step, as `examples/step_speed` times it: from bytes in the host's memory until loss and norm
//! are back.

use pixmim::Device;
use pixmim::model::params::Table;
use pixmim::train::cost;
use pixmim::train::step::Trainer;

use crate::report::Row;
use crate::workload::{self, Images, Precision, Workload};
use crate::{Bench, PRECISIONS, name};

/// Images at a time, if that many fit: more are accumulated.
const MOST_IMAGES: usize = 1024;

pub(crate) fn bench(bench: &mut Bench) {
    for (place, network) in bench.networks.clone().into_iter().enumerate() {
        // In f32 the smaller two.
        for precision in PRECISIONS.into_iter().skip(usize::from(place > 1)) {
            step(bench, network, precision);
        }
    }
}

fn step(bench: &mut Bench, mut network: Workload, precision: Precision) {
    network.images = network.images.min(MOST_IMAGES);
    if bench.only_tried {
        (network.config.depth, network.config.decoder_depth) = (1, 1);
    }
    let (dev, dtype) = precision.on(&bench.dev);
    let id = ["train", &format!("step {}", name(precision)), network.name];
    if let (Device::Cpu(_), Some(available)) = (&dev, available_bytes()) {
        let needed = 20 * Table::new(&network.config).parameters();
        if needed > available {
            let [needed, available] = [needed, available].map(|bytes| bytes >> 30);
            println!("{} is left out: needs {needed} GiB, there are {available}", id.join("/"));
            return;
        }
    }
    // Made at the first use: criterion calls this for every sample, and not at all if it is filtered out.
    let mut run: Option<(Workload, Trainer, Images)> = None;
    let took = bench.measure(id, None, |b| {
        let (_, trainer, images) = run.get_or_insert_with(|| {
            let (network, trainer) = match &dev {
                Device::Cuda(_) => network.fitting(network.images, &dev, dtype).unwrap(),
                _ => (network, network.trainer(&dev, dtype).unwrap()),
            };
            (network, trainer, Images::new(&network))
        });
        b.iter(|| workload::step(trainer, images, 1, 0).unwrap());
    });
    if let (Some(took), Some((network, trainer, _))) = (took, run) {
        bench.rows.push(Row {
            op: "train".into(),
            direction: "step".into(),
            shape: network.name.into(),
            batch: network.images,
            precision: name(precision),
            took,
            images_per_second: Some(network.images as f64 / took.as_secs_f64()),
            cost: Some(cost::step(&trainer, 1)),
        });
    }
}

/// What Linux could give a program without swapping.
fn available_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib << 10)
}
