//! Functions that are no ops: what makes contexts, filters and tensors.

use super::*;

/// `DLTensor` of DLPack: f32 of 2 x 3 on the CPU.
fn dl_tensor() -> Arg {
    static SHAPE: [i64; 2] = [2, 3];
    static STRIDES: [i64; 2] = [3, 1];
    static DATA: [f32; 6] = [0.0; 6];
    let address = |pointer: *const u8| pointer.expose_provenance() as u64;
    // Device CPU (1) and its number; two dimensions, float (2) of 32 bits and 1 lane.
    Arg::Block(Box::new([
        address(DATA.as_ptr().cast()),
        1,
        2 | 2 << 32 | 32 << 40 | 1 << 48,
        address(SHAPE.as_ptr().cast()),
        address(STRIDES.as_ptr().cast()),
        0,
    ]))
}

pub(super) fn others(lab: &Lab) -> Vec<Case> {
    // `struct_size` and `threads`: 1; `struct_size`.
    let options = Arg::Block(Box::new([16 | 1 << 32, 0]));
    // Room for more devices than there are.
    let mut devices = vec![0; 32 * size_of::<pixmim_device_info>() / 8];
    devices[0] = size_of::<pixmim_device_info>() as u64;
    vec![
        case!(pixmim_probe {
            devices: Arg::Block(devices.into()),
            capacity: int(1),
            count: place(4)
        }),
        case!(pixmim_context_create {
            device: int(i64::from(PIXMIM_CPU)),
            options: options,
            out: place(8),
        }),
        case!(pixmim_filter_create {
            context: context(lab),
            size: int(SIDE as i64),
            radius: number(2.5),
            out: place(8),
            stream: stream(),
        }),
        case!(pixmim_tensor_init {
            out: place(size_of::<pixmim_tensor>()),
            data: place(24),
            dtype: int(i64::from(PIXMIM_F32)),
            device: int(i64::from(lab.device)),
            ndim: int(2),
            shape: Arg::Block(Box::new([2, 3])),
        }),
        case!(pixmim_tensor_from_dlpack {
            out: place(size_of::<pixmim_tensor>()),
            dl_tensor: dl_tensor(),
        }),
    ]
}
