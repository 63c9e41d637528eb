//! What the rows are measured against, as rows: `pixmim::train::peaks` in the same run.

use pixmim::ops::cost::Peaks;
use pixmim::train::peaks::{self, Fastest};
use pixmim::{Device, Result};

use crate::report::Row;
use crate::workload::Precision;
use crate::{PRECISIONS, name};

/// The roofs of a device.
pub(crate) struct Measured {
    /// As they stand in the record: the copy, and the product in each precision.
    pub(crate) rows: Vec<Row>,
    copy: Fastest,
    /// In each of [`PRECISIONS`].
    products: [Fastest; 2],
}

impl Measured {
    pub(crate) fn new(dev: &Device) -> Result<Self> {
        let product = |precision: Precision| {
            let (dev, dtype) = precision.on(dev);
            peaks::product(&dev, dtype)
        };
        let (copy, [f32, bf16]) = (peaks::copy(dev)?, PRECISIONS.map(product));
        let products = [f32?, bf16?];
        let row = |direction: &str, shape, precision, found: &Fastest| Row {
            op: "peak".into(),
            direction: direction.into(),
            shape,
            batch: 1,
            precision,
            took: found.took,
            images_per_second: None,
            cost: Some(found.cost),
        };
        let mut rows = vec![row("copy", format!("{} MiB", copy.size >> 20), "u8", &copy)];
        for (precision, found) in PRECISIONS.into_iter().zip(&products) {
            rows.push(row("product", found.size.to_string(), name(precision), found));
        }
        Ok(Self { rows, copy, products })
    }

    /// The roofs of work whose products are in this precision; of work that has none, those of f32.
    pub(crate) fn of(&self, precision: &str) -> Peaks {
        let [f32, bf16] = &self.products;
        let product = if precision == name(Precision::Bf16) { bf16 } else { f32 };
        Peaks {
            bytes_per_second: self.copy.bytes_per_second(),
            flops_per_second: product.flops_per_second(),
        }
    }
}
