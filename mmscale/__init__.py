"""mmscale: distributed training of models that read text, images and audio together.

    from mmscale.recipes import get
    from mmscale.train import train
    report = train(get("quickstart").override("optim.lr=3e-4"))

Everything here runs inside one worker; `mmscale_launcher` starts workers through Ray, `mmscale_kernels` has the
operators.
"""
