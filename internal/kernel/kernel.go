// Package kernel owns what makes a kernel bootable in a sandbox: unpacking it, choosing and
// ordering its modules, the initrd that carries the guest program, and the modules image.
//
// It never decides which kernel a sandbox boots, never loads a module, and runs no program but
// mke2fs and debugfs, for the modules image.
package kernel
