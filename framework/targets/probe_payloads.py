"""Two tiny guests that prove that an accelerator runs ordinary code, with their sources.

A hypervisor can run firmware and still hang an operating system (seen: SeaBIOS and 16-bit code
ran, the kernel never came up), so the x86 guest goes where a kernel goes: protected and long
mode, paging, an address-space switch in a loop, counted work. Both print one line on the serial
port and halt. They are assembled already, so that no assembler is needed; a test assembles the
sources again and compares.
"""

from __future__ import annotations

__all__ = ["AARCH64_FIRMWARE", "AARCH64_SOURCE", "MARKER", "X86_FLOPPY", "X86_SOURCE"]

MARKER = "BROWNOUT PROBE OK"
_FLOPPY_BYTES = 65536

#: GNU as, `--64`, linked at 0x7c00 as a flat binary: a boot sector.
X86_SOURCE = r"""
        .code16
        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp
        movl    $0x1000, %edi           # page tables at 0x1000: PML4, PDPT, PD
        movl    %edi, %cr3
        xorl    %eax, %eax
        movl    $0x1400, %ecx
        cld
        rep stosl                       # and the counter at 0x5000
        movl    $0x2003, 0x1000
        movl    $0x3003, 0x2000
        movl    $0x83, 0x3000           # one 2 MiB page, identity
        movl    %cr4, %eax
        orl     $0x20, %eax             # PAE
        movl    %eax, %cr4
        movl    $0xc0000080, %ecx       # EFER.LME
        rdmsr
        orl     $0x100, %eax
        wrmsr
        lgdtw   gdtr
        movl    %cr0, %eax
        orl     $0x80000001, %eax       # paging and protection
        movl    %eax, %cr0
        ljmpw   $8, $long
        .code64
long:   movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $0x200000, %ecx         # work: two million read-modify-writes
1:      incl    0x5000
        decl    %ecx
        jnz     1b
        movl    $0x400, %ecx            # a thousand address-space switches
2:      movq    %cr3, %rax
        movq    %rax, %cr3
        decl    %ecx
        jnz     2b
        movl    $0x5000, %esi
        cmpl    $0x200000, (%rsi)       # and the work must have been done
        jne     4f
        movl    $text, %esi
3:      lodsb
        testb   %al, %al
        jz      4f
        movw    $0x3f8, %dx
        outb    %al, %dx
        jmp     3b
4:      hlt
        jmp     4b
text:   .asciz  "BROWNOUT PROBE OK\n"
        .balign 8
gdt:    .quad   0
        .quad   0x00af9a000000ffff
        .quad   0x00cf92000000ffff
gdtr:   .word   23
        .long   gdt
        .org    510
        .word   0xaa55
"""

_X86_CODE = bytes.fromhex(
    "fa31c08ed88ec08ed0bc007c66bf001000000f22df6631c066b900140000fc66f3ab66c706001003"
    "20000066c70600200330000066c7060030830000000f20e06683c8200f22e066b9800000c00f3266"
    "0d000100000f300f0116e87c0f20c0660d010000800f22c0ea6d7c0800b8100000008ed88ec08ed0"
    "b900002000ff042500500000ffc975f5b9000400000f20d80f22d8ffc975f6be00500000813e0000"
    "20007511beb87c0000ac84c0740766baf803eeebf4f4ebfd42524f574e4f55542050524f4245204f"
    "4b0a000f1f4400000000000000000000ffff0000009aaf00ffff00000092cf001700d07c"
)
#: The boot sector as a floppy image.
X86_FLOPPY = (_X86_CODE.ljust(510, b"\0") + b"\x55\xaa").ljust(_FLOPPY_BYTES, b"\0")

#: LLVM or GNU as for aarch64: the firmware of `-M virt`, position independent.
AARCH64_SOURCE = r"""
        movz    x0, #0x0900, lsl #16    // the PL011 of -M virt
        adr     x1, text
        movz    w3, #0x20, lsl #16      // work: two million iterations
1:      subs    w3, w3, #1
        b.ne    1b
2:      ldrb    w2, [x1], #1
        cbz     w2, 3f
        str     w2, [x0]
        b       2b
3:      wfi
        b       3b
text:   .asciz  "BROWNOUT PROBE OK\n"
"""

AARCH64_FIRMWARE = bytes.fromhex(
    "0020a1d2410100100304a05263040071e1ffff542214403862000034020000b9fdffff177f2003d5"
    "ffffff1742524f574e4f55542050524f4245204f4b0a00"
)
