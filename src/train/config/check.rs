//! Whether the values of a config are possible, and fit together.

use super::keys::KEYS;
use super::{Auto, Config, write};
use crate::model::MaeConfig;
use crate::model::config::near_divisors;
use crate::{Error, Result};

/// Most patches of an image: positions, ids and the decoder's attention stay far from overflow.
const MAX_PATCHES: usize = 1 << 16;

impl Config {
    /// Refuses what cannot be trained, before anything is allocated or written.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the key, what is wrong, and what would be right.
    pub fn check(&self) -> Result<()> {
        self.check_ranges()?;
        self.check_model()?;
        self.check_masking()?;
        self.check_crop()?;
        self.check_optim()?;
        self.check_schedule()
    }

    /// Each value alone, by the table of keys.
    fn check_ranges(&self) -> Result<()> {
        for (key, path) in [("data.path", &self.data.path), ("log.out", &self.log.out)] {
            if path.to_str().is_none() {
                return Err(Error::invalid(key, "is not UTF-8; rename the folder"));
            }
        }
        if i64::try_from(self.runtime.seed).is_err() {
            let why = format!("is {}, expected at most {}", self.runtime.seed, i64::MAX);
            return Err(Error::invalid("runtime.seed", why));
        }
        let table = write::to_table(self)?;
        for key in KEYS {
            let Some(value) = key.of(&table) else { continue };
            if key.kind.accept(value.clone()).is_none() {
                let why = format!("is {}, expected {}", key.kind.show(value), key.kind);
                return Err(Error::invalid(key.name, why));
            }
        }
        Ok(())
    }

    fn check_model(&self) -> Result<()> {
        self.model.check()?;
        if self.patches() > MAX_PATCHES {
            let MaeConfig { image_size, patch_size, .. } = self.model;
            let why = format!(
                "is {patch_size}: an image of {image_size} pixels a side has {} patches, more than {MAX_PATCHES}; \
                 use a larger patch or a smaller model.image_size",
                self.patches()
            );
            return Err(Error::invalid("model.patch_size", why));
        }
        Ok(())
    }

    fn check_masking(&self) -> Result<()> {
        let (patches, kept) = (self.patches(), self.kept_patches());
        let ratio = self.method.mask_ratio;
        if patches < 2 {
            let why = format!(
                "is {}: the image is a single patch, and nothing would be left to see or to mask; use a \
                 smaller patch",
                self.model.patch_size
            );
            return Err(Error::invalid("model.patch_size", why));
        }
        if kept == 0 {
            let most = 1.0 - 1.0 / patches as f64;
            let why = format!(
                "is {ratio} and keeps none of {patches} patches; use at most {:.4}",
                floor_to(most, 4)
            );
            return Err(Error::invalid("method.mask_ratio", why));
        }
        if kept == patches {
            let why = format!("is {ratio} and masks none of {patches} patches; use a larger ratio");
            return Err(Error::invalid("method.mask_ratio", why));
        }
        let grid = self.model.image_size / self.model.patch_size;
        let block = self.method.mask_block;
        if block > grid {
            let why =
                format!("is {block}, larger than the grid of {grid} x {grid} patches; use 1 or 2");
            return Err(Error::invalid("method.mask_block", why));
        }
        Ok(())
    }

    fn check_crop(&self) -> Result<()> {
        let image = self.model.image_size;
        if let Auto::Value(padding) = self.method.padding
            && padding >= image
        {
            let why = format!(
                "is {padding}, but a reflected border must be narrower than model.image_size {image}; \
                 use \"auto\""
            );
            return Err(Error::invalid("method.padding", why));
        }
        let [smallest, largest] = self.method.crop_scale;
        if smallest > largest {
            let why = format!("is [{smallest}, {largest}]; put the smaller share first");
            return Err(Error::invalid("method.crop_scale", why));
        }
        Ok(())
    }

    fn check_optim(&self) -> Result<()> {
        let optim = &self.optim;
        let (global, micro) = (optim.global_batch, optim.micro_batch);
        if global % micro != 0 {
            let why = format!(
                "is {micro} and does not divide optim.global_batch {global}; use {}",
                near_divisors(global, micro)
            );
            return Err(Error::invalid("optim.micro_batch", why));
        }
        let given = [optim.lr.is_some(), optim.base_lr.is_some()];
        one_of(["optim.lr", "optim.base_lr"], given)?;
        let (min_lr, peak) = (self.schedule.min_lr, self.peak_lr());
        if min_lr > peak {
            let why = format!("is {min_lr:e}, over the peak learning rate of {peak:e}; lower it");
            return Err(Error::invalid("schedule.min_lr", why));
        }
        Ok(())
    }

    fn check_schedule(&self) -> Result<()> {
        let given = [self.schedule.steps.is_some(), self.schedule.epochs.is_some()];
        one_of(["schedule.steps", "schedule.epochs"], given)
    }
}

/// Exactly one of two keys.
fn one_of([key, other]: [&str; 2], given: [bool; 2]) -> Result<()> {
    let is = match given {
        [true, true] => "is given beside",
        [false, false] => "is not given, nor is",
        _ => return Ok(()),
    };
    Err(Error::invalid(key, format!("{is} `{other}`; give one of them")))
}

/// Rounds down, so that what is proposed is allowed.
fn floor_to(number: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (number * scale).floor() / scale
}
